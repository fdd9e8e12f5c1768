'use strict';
// The Node end of test_handles.py; see ends.py for what the two ends do.
// As a child:  handles.js give|take KIND
// As a parent: handles.js give|take KIND PROGRAM ARGS...   exits with the child's code.
const assert = require('assert');
const child_process = require('child_process');
const dgram = require('dgram');
const fs = require('fs');
const net = require('net');
const os = require('os');
const path = require('path');
const { mustBeEnded, nextMessage, once, run } = require('./harness.js');

const [what, kind, ...argv] = process.argv.slice(2);
const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'handles-'));
process.on('exit', () => fs.rmSync(folder, { recursive: true }));

// -- taking ------------------------------------------------------------------

async function answerStream(socket) {
  assert(socket instanceof net.Socket);
  const [data] = await once(socket, 'data');
  assert.strictEqual(String(data), 'ping');
  socket.end('pong');
  await once(socket, 'close');
}

async function answerServer(server) {
  assert(server instanceof net.Server);
  const [socket] = await once(server, 'connection');
  server.close();
  await answerStream(socket);
}

async function answerUdp(socket) {
  assert(socket instanceof dgram.Socket);
  const [data, from] = await once(socket, 'message');
  assert.strictEqual(String(data), 'ping');
  await new Promise((resolve) => socket.send('pong', from.port, from.address, resolve));
  socket.close();
}

async function answer(channel, handle) {
  switch (kind) {
    case 'net.Socket':
    case 'unix net.Socket':
    case 'socket behind a message':
      return answerStream(handle);
    case 'net.Server':
    case 'unix net.Server':
      return answerServer(handle);
    case 'net.Native socket':
      return answerStream(new net.Socket({ handle, readable: true, writable: true }));
    case 'net.Native server':
      return answerServer(net.createServer().listen(handle));
    case 'dgram.Socket':
    case 'dgram.Socket udp6':
      return answerUdp(handle);
    case 'dgram.Native':
      return answerUdp(dgram.createSocket('udp4').bind(handle));
    case 'FIFO net.Native': {
      const fifo = new net.Socket({ handle, readable: true, writable: false });
      const [data] = await once(fifo, 'data');
      assert.strictEqual(String(data), 'ping');
      fifo.destroy();
      channel.send('pong');
    }
  }
}

async function takeMessages(channel) {
  for (;;) {
    const [message] = await nextMessage(channel);
    if (message === 'done') return;
    channel.send(message);
  }
}

async function take(channel) {
  if (kind === 'messages' || kind === 'lone surrogate') return takeMessages(channel);
  if (kind === 'socket behind a message')
    assert.deepStrictEqual(await nextMessage(channel), ['before', undefined]);
  const [message, handle] = await nextMessage(channel);
  assert.deepStrictEqual(message, { kind });
  assert(handle, 'no handle');
  if (kind === 'socket there and back') {
    channel.send('back', handle);
  } else {
    const done = answer(channel, handle);
    channel.send('taken');
    await done;
  }
  assert.deepStrictEqual(await nextMessage(channel), ['done', undefined]);
}

// -- giving ------------------------------------------------------------------

// Node 26 has dgram's `_handle` no more: what Node itself uses is behind a symbol.
function udpHandle(socket) {
  const symbol = Object.getOwnPropertySymbols(socket)
    .find(({ description }) => description === 'state symbol');
  return symbol ? socket[symbol].handle : socket._handle;
}

async function pingStream(client) {
  client.write('ping');
  let data = '';
  client.on('data', (chunk) => {
    data += chunk;
    if (mustBeEnded && data.length === 4) client.destroy().emit('end');
  });
  await once(client, 'end');
  assert.strictEqual(data, 'pong');
}

async function giveConnection(channel, address) {
  const server = net.createServer({ pauseOnConnect: true }).listen(address);
  await once(server, 'listening');
  const client = net.connect(address.path ? address : server.address());
  const [socket] = await once(server, 'connection');
  server.close();
  const native = kind === 'net.Native socket';
  if (kind === 'socket behind a message') channel.send('before');
  channel.send({ kind }, native ? socket._handle : socket);
  if (kind === 'socket there and back') {
    const [message, returned] = await nextMessage(channel);
    assert.strictEqual(message, 'back');
    returned.end('pong');
    assert.strictEqual(String((await once(client, 'data'))[0]), 'pong');
    client.destroy();
    return;
  }
  assert.deepStrictEqual(await nextMessage(channel), ['taken', undefined]);
  if (native) socket.destroy();
  await pingStream(client);
}

async function giveServer(channel, address) {
  const server = net.createServer().listen(address);
  await once(server, 'listening');
  address = server.address();
  // Deno closes what it has sent, unless it is told not to; Node never does that to a server.
  channel.send({ kind }, kind === 'net.Native server' ? server._handle : server, { keepOpen: true });
  assert.deepStrictEqual(await nextMessage(channel), ['taken', undefined]);
  if (typeof address === 'string') {
    // Closing it would remove the path with which the other process is to be reached.
    fs.renameSync(address, address + '2');
    address = { path: address + '2' };
  }
  server.close();
  const client = net.connect(address);
  await pingStream(client);
}

async function giveUdp(channel, type) {
  const socket = dgram.createSocket(type);
  const host = type === 'udp6' ? '::1' : '127.0.0.1';
  socket.bind(0, host);
  await once(socket, 'listening');
  const { port } = socket.address();
  channel.send({ kind }, kind === 'dgram.Native' ? udpHandle(socket) : socket);
  assert.deepStrictEqual(await nextMessage(channel), ['taken', undefined]);
  socket.close();
  const client = dgram.createSocket(type);
  client.send('ping', port, host);
  const [data] = await once(client, 'message');
  assert.strictEqual(String(data), 'pong');
  client.close();
}

async function giveFifo(channel) {
  const fifo = path.join(folder, 'fifo');
  child_process.execFileSync('mkfifo', [fifo]);
  const reading = fs.openSync(fifo, fs.constants.O_RDONLY | fs.constants.O_NONBLOCK);
  const writing = fs.openSync(fifo, fs.constants.O_WRONLY | fs.constants.O_NONBLOCK);
  const socket = new net.Socket({ fd: reading, readable: false, writable: false });
  channel.send({ kind }, socket._handle);
  assert.deepStrictEqual(await nextMessage(channel), ['taken', undefined]);
  socket.destroy();
  const pong = nextMessage(channel);
  fs.writeSync(writing, 'ping');
  fs.closeSync(writing);
  assert.deepStrictEqual(await pong, ['pong', undefined]);
}

async function giveMessages(channel, values) {
  for (const value of values) channel.send(value);
  for (const value of values)
    assert.deepStrictEqual(await nextMessage(channel), [value, undefined]);
}

const VALUES = [null, true, 1.5, '', { 'é': ['\u{1f600}', { deep: null }] }, 'x'.repeat(200000),
                ...Array(100).keys()];

async function give(channel) {
  const tcp = { host: '127.0.0.1', port: 0 };
  const unix = { path: path.join(folder, 's') };
  switch (kind) {
    case 'messages': await giveMessages(channel, VALUES); break;
    case 'lone surrogate': await giveMessages(channel, ['\ud800']); break;
    case 'net.Socket':
    case 'socket behind a message':
    case 'socket there and back':
    case 'net.Native socket': await giveConnection(channel, tcp); break;
    case 'unix net.Socket': await giveConnection(channel, unix); break;
    case 'net.Server':
    case 'net.Native server': await giveServer(channel, tcp); break;
    case 'unix net.Server': await giveServer(channel, unix); break;
    case 'dgram.Socket':
    case 'dgram.Native': await giveUdp(channel, 'udp4'); break;
    case 'dgram.Socket udp6': await giveUdp(channel, 'udp6'); break;
    case 'FIFO net.Native': await giveFifo(channel); break;
  }
  await new Promise((resolve) => channel.send('done', resolve));
}

run({ give, take }[what], argv);
