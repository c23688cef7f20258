"""Stage: registers policy and reward model, and promotes them if the gate says so."""
