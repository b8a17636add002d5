"""`sagecp dev`: a control plane, simulated engines and their agents on one machine."""
