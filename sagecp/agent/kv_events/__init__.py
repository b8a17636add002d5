"""An engine's KV-cache events: from its publisher to updates for the control plane."""
