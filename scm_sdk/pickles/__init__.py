"""Read weights from untrusted pickles: the pickle is parsed as data, and none of its code is executed."""
