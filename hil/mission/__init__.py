"""Pure physics and time of a mission: orbit, shadow, passes, radio, electrical power, clock, timeline. No I/O."""
