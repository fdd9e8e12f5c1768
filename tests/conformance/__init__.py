"""Node's own tests of child_process and its known bugs, as tests of handleipc."""
