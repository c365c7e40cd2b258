"""A worker for an application and a broker: `starting` waits for the servers, `worker_service` runs the worker."""
