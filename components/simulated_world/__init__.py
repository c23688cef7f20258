"""A small simulated world for the default profile: support requests, replies, raters, and the preference they really have.

Everything here is simulated and says so. It exists because the true preference is known, so that a run can compare what its
reward model believes with the truth; nothing in it was said or judged by a person.
"""
