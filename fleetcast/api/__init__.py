"""HTTP: the door for records, the answers, the server and its thread."""
