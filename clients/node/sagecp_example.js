// A small program that talks to sagecp with nothing but the protos.
//
//   node sagecp_example.js instances
//   node sagecp_example.js generate "Tell me a story" --max-tokens 64
//   node sagecp_example.js submit "Tell me a story"
//   node sagecp_example.js stream REQUEST_ID
//
// The .proto files are read when the program starts; nothing is generated.

import path from 'node:path';
import { parseArgs } from 'node:util';
import { fileURLToPath } from 'node:url';
import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';

const here = path.dirname(fileURLToPath(import.meta.url));
const protos = process.env.SAGECP_PROTOS ?? path.join(here, '..', '..', 'protos');

const definition = protoLoader.loadSync(
  ['sagecp/v1/inference_service.proto', 'sagecp/v1/fleet_service.proto', path.join(here, 'error_details.proto')],
  // Enums as names, 64-bit numbers as strings (they may exceed a JavaScript
  // number), and every field present, so that a zero needs no special case.
  { includeDirs: [protos], keepCase: false, enums: String, longs: String, defaults: true, oneofs: true },
);
const { InferenceService, FleetService } = grpc.loadPackageDefinition(definition).sagecp.v1;

/** Reads the google.rpc details of a failed call: its reason, bad fields and retry time. */
function errorDetails(error) {
  const found = { reason: '', metadata: {}, fields: [], retryAfterSeconds: null };
  const [bytes] = error.metadata?.get('grpc-status-details-bin') ?? [];
  if (bytes === undefined) return found;
  for (const detail of definition['google.rpc.Status'].deserialize(bytes).details) {
    const name = detail.type_url.split('/').at(-1);
    const type = definition[name];
    if (type === undefined) continue; // a detail that this program does not know
    const value = type.deserialize(detail.value);
    if (name === 'google.rpc.ErrorInfo') {
      found.reason = value.reason;
      found.metadata = value.metadata;
    } else if (name === 'google.rpc.BadRequest') {
      found.fields = value.fieldViolations;
    } else if (name === 'google.rpc.RetryInfo') {
      found.retryAfterSeconds = Number(value.retryDelay.seconds) + value.retryDelay.nanos / 1e9;
    }
  }
  return found;
}

/** One line per fact about a failed call. */
function explain(error) {
  const { reason, metadata, fields, retryAfterSeconds } = errorDetails(error);
  const lines = [`${grpc.status[error.code]}: ${error.details}`];
  if (reason) lines.push(`  reason ${reason} ${JSON.stringify(metadata)}`);
  for (const { field, description } of fields) lines.push(`  ${field}: ${description}`);
  if (retryAfterSeconds !== null) lines.push(`  try again in ${retryAfterSeconds.toFixed(1)} s`);
  return lines.join('\n');
}

/** Calls a unary method and returns a promise of the response. */
function call(client, method, request, options) {
  return new Promise((resolve, reject) => {
    client[method](request, options, (error, response) => (error ? reject(error) : resolve(response)));
  });
}

/**
 * Prints the text of a stream as it arrives, and what it took at the end.
 *
 * A stream that just stops is a failure: only a terminal message says that the
 * output is complete.
 */
async function printOutput(stream) {
  // Leaving early (Ctrl-C) cancels the call, and with it the engine's work.
  const leave = () => stream.cancel();
  process.once('SIGINT', leave);
  let end = null;
  try {
    for await (const event of stream) {
      if (event.event === 'opened') console.error(`request ${event.opened.requestId}`);
      else if (event.event === 'chunk') process.stdout.write(event.chunk.text);
      else if (event.event === 'terminal') end = event.terminal;
    }
  } finally {
    process.removeListener('SIGINT', leave);
  }
  process.stdout.write('\n');
  if (end === null) throw new Error('the stream was lost before its end; call stream with the request id to go on');
  console.error(
    `${end.state.replace('REQUEST_STATE_', '')} on ${end.instanceId || 'no instance'}: ` +
      `${end.usage?.promptTokenCount ?? 0} tokens in, ${end.usage?.completionTokenCount ?? 0} out, ` +
      `finish reason ${end.finishReason || 'none'}`,
  );
}

const { values: flags, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    address: { type: 'string', default: process.env.SAGECP_SERVER ?? '127.0.0.1:50051' },
    timeout: { type: 'string', default: '60' },
    model: { type: 'string', default: '' },
    chat: { type: 'boolean', default: false },
    'max-tokens': { type: 'string' },
    temperature: { type: 'string' },
    'request-id': { type: 'string', default: '' },
    'from-token-index': { type: 'string', default: '0' },
  },
});

function requestSpec(prompt) {
  const sampling = {};
  if (flags['max-tokens'] !== undefined) sampling.maxTokens = Number(flags['max-tokens']);
  if (flags.temperature !== undefined) sampling.temperature = Number(flags.temperature);
  return {
    requestId: flags['request-id'],
    model: flags.model,
    prompt: flags.chat ? { chat: { messages: [{ role: 'user', text: prompt }] } } : { text: prompt },
    sampling,
  };
}

// Every call has a deadline: without one a lost server is waited for without end.
const options = () => ({ deadline: Date.now() + Number(flags.timeout) * 1000 });
const credentials = grpc.credentials.createInsecure();
const inference = new InferenceService(flags.address, credentials);
const fleet = new FleetService(flags.address, credentials);

const commands = {
  async instances() {
    let pageToken = '';
    do {
      const page = await call(fleet, 'listInstances', { pageSize: 100, pageToken }, options());
      for (const { spec, state } of page.instances) {
        console.log(`${spec.instanceId}\t${spec.modelName}\t${state.replace('INSTANCE_STATE_', '')}`);
      }
      pageToken = page.nextPageToken;
    } while (pageToken);
  },
  async generate(prompt) {
    await printOutput(inference.generate({ spec: requestSpec(prompt) }, options()));
  },
  async submit(prompt) {
    const { request } = await call(inference, 'submit', { spec: requestSpec(prompt) }, options());
    console.log(request.requestId);
  },
  async stream(requestId) {
    await printOutput(inference.stream({ requestId, fromTokenIndex: flags['from-token-index'] }, options()));
  },
};

const [command, argument] = positionals;
if (!(command in commands) || (command !== 'instances' && argument === undefined)) {
  console.error('usage: sagecp_example.js [--address HOST:PORT] instances | generate PROMPT | submit PROMPT | stream ID');
  process.exitCode = 2;
} else {
  try {
    await commands[command](argument);
  } catch (error) {
    console.error(error.code === undefined ? error.message : explain(error));
    process.exitCode = 1;
  }
}
inference.close();
fleet.close();
