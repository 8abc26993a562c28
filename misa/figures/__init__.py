"""Pictures: functions from arrays to matplotlib figures."""
