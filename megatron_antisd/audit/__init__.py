"""What the teacher really saw: checks on the decoded prompts, and alarms on u. Every run does them; `tools/context_audit.py` prints them."""
