"""What is asked (`demand`), what answers (`deployment`), the file both come from, and the schedule of requests."""
