"""The training service: the Tinker protocol over HTTP, durable, for many tenants over one base."""
