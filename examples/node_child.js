// A Node.js child for the README's parent.py: handleipc.spawn("node", "node_child.js").
process.on('message', (message, socket) => {
  if (message !== 'socket' || !socket) return;
  socket.on('error', () => {}); // a client that resets its connection ends nothing but that
  socket.setTimeout(2000, () => socket.destroy()); // nor does one stay that never closes it
  socket.resume(); // its end is seen only behind what it has sent
  socket.end('Child handled it.');
});
