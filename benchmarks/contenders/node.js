// Node.js as its users run it: `node node.js ROLE PROGRAM N`, where PROGRAM runs the child: the path
// of a Node.js, or that of a Python. While send() returns true; then when the last has been written.
const { fork, spawn } = require('child_process');
const cluster = require('cluster');
const net = require('net');
const path = require('path');

const ANSWER = 'Child handled it.';
const OURS = path.join(__dirname, 'ours.py');
const ROOT = path.join(__dirname, '..', '..');

const message = (i, n) => ({ op: 'route', n: i, of: n, ok: true });

const report = (count, start) =>
  console.log(JSON.stringify({ count, seconds: Number(process.hrtime.bigint() - start) / 1e9 }));

const large = (what, size) => {
  if (what === 'string') return 'x'.repeat(size);
  const count = Math.floor(size / 81);
  return Array.from({ length: count }, (_, id) => ({ id, name: `object ${id}`, from: '127.0.0.1', tags: ['a', 'b'], ok: true }));
};

// Take everything, close what comes, and say when all is there.
const child = () => {
  let count = 0;
  process.on('message', (received, handle) => {
    if (handle) handle.destroy();
    if (typeof received === 'object' && !Array.isArray(received)) {
      if (++count === received.of) process.send('done');
    } else process.send('warm');
  });
};

const start = (program, ready, serialization = 'json') => {
  const options = { serialization, stdio: [0, 1, 2, 'ipc'], env: { ...process.env, PYTHONPATH: ROOT } };
  const args = program.includes('node') ? [__filename, 'child'] : [OURS, 'child', 'batches'];
  const started = spawn(program, args, options);
  started.once('message', () => ready(started));
  started.send('warm');
  return started;
};

// A connection, or n of them, accepted by a server.
const accepted = (n, ready) => {
  const sockets = [];
  const server = net.createServer((socket) => {
    sockets.push(socket);
    if (sockets.length === n) ready(sockets);
  });
  server.listen({ port: 0, host: '127.0.0.1', backlog: 4096 }, () => {
    const { port } = server.address();
    let opened = 0;
    const more = () => {
      if (opened++ < n) net.connect(port, '127.0.0.1', more);
    };
    more();
  });
};

const finish = (started, n, begin) => {
  started.on('message', () => {
    report(n, begin);
    process.exit(0);
  });
};

const sendAll = (program, n, socketOf, atOnce, serialization) =>
  start(program, (started) => {
    const begin = process.hrtime.bigint();
    finish(started, n, begin);
    let sent = 0;
    const more = () => {
      while (sent < n) {
        const i = sent++;
        const last = !atOnce && (sent % 64 === 0 || sent === n);
        const args = [message(i, n)];
        if (socketOf) args.push(socketOf(i), { keepOpen: true });
        if (last) args.push(more);
        started.send(...args);
        if (last) return;
      }
    };
    more();
  }, serialization);

const roles = {
  child,
  messages: (program, n) => sendAll(program, Number(n)),
  advanced: (program, n) => sendAll(program, Number(n), undefined, false, 'advanced'),
  handles: (program, n) => accepted(1, ([socket]) => sendAll(program, Number(n), () => socket)),
  queued: (program, n) => accepted(1, ([socket]) => sendAll(program, Number(n), () => socket, true)),
  distinct: (program, n) =>
    accepted(Number(n), (sockets) =>
      start(program, (started) => {
        finish(started, Number(n), process.hrtime.bigint());
        sockets.forEach((socket, i) => started.send(message(i, Number(n)), socket));
      })),
  // Children, one after the other; each is up when it has answered.
  start: (program, n) => {
    const laps = [];
    const next = () => {
      if (laps.length === Number(n)) {
        console.log(JSON.stringify({ count: laps.length, laps }));
        return;
      }
      const begin = process.hrtime.bigint();
      start(program, (started) => {
        laps.push(Number(process.hrtime.bigint() - begin) / 1e9);
        started.disconnect();
        started.on('exit', next);
      });
    };
    next();
  },
  large: (program, what, size, n) =>
    start(program, (started) => {
      const sent = large(what, Number(size));
      const begin = process.hrtime.bigint();
      let left = Number(n);
      const next = () => {
        if (left-- === 0) {
          report(Number(n), begin);
          process.exit(0);
        }
        started.send(sent);
      };
      started.on('message', next);
      next();
    }),
  // Accept, hand to the children in turn, and let them answer. Until SIGTERM.
  hand_out: (children) => {
    const workers = Array.from({ length: Number(children) }, () => fork(__filename, ['answerer']));
    let turn = 0;
    const server = net.createServer({ pauseOnConnect: true }, (socket) => {
      workers[turn].send('socket', socket);
      turn = (turn + 1) % workers.length;
    });
    let ready = 0;
    workers.forEach((worker) =>
      worker.once('message', () => {
        if (++ready === workers.length) {
          server.listen({ port: 0, host: '127.0.0.1', backlog: 1024 }, () => console.log(server.address().port));
        }
      }));
    process.on('SIGTERM', () => {
      workers.forEach((worker) => worker.kill());
      process.exit(0);
    });
  },
  answerer: () => {
    process.on('message', (_, socket) => socket && socket.end(ANSWER));
    process.send('ready');
  },
  cluster: (children) => {
    if (cluster.isWorker) {
      net.createServer((socket) => socket.end(ANSWER)).listen({ port: 0, host: '127.0.0.1', backlog: 1024 });
      return;
    }
    cluster.schedulingPolicy = cluster.SCHED_RR;
    let ready = 0;
    cluster.on('listening', (_, address) => {
      if (++ready === Number(children)) console.log(address.port);
    });
    for (let i = 0; i < Number(children); i++) cluster.fork();
    process.on('SIGTERM', () => {
      Object.values(cluster.workers).forEach((worker) => worker.process.kill('SIGKILL'));
      process.exit(0);
    });
  },
};

const [role, ...args] = process.argv.slice(2);
roles[role](...args);
