"""Stage: compares a candidate policy with SFT and with the champion, and decides the gate."""
