"""From a flight's record to its verdict, JUnit file and report; and the flight itself."""
