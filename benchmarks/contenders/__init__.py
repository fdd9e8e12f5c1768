"""The programs that are measured. Each prints one line of JSON: seconds, and how many it did."""
