"""The vhost-user front end: another process serves a device's queues, and this is how it is told about them."""
