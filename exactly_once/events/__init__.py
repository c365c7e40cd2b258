"""What is told of deliveries: a frozen record of each run that ended, and the alert for what only a person can mend."""
