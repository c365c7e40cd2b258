"""What happened to each delivery, as frozen records; who counts or shows it reads them, and changes nothing of what happens."""
