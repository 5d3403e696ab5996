"""The doctor: asks all hosts at once what they have and whether they reach each other, before anything starts there."""
