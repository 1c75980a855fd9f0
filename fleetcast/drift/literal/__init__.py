"""The four metrics as the specification defines them, against one baseline."""
