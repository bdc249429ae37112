"""Training of TrigFlow teachers and sCM students on one machine; runs resume by running again."""
