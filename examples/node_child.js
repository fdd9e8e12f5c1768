// A Node.js child for the README's parent.py: handleipc.spawn("node", "node_child.js").
process.on('message', (message, socket) => {
  if (message === 'socket') socket.end('Child handled it.');
});
