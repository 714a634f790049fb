"""Files and places, whatever they are used for: writing, leases, URLs, object stores."""
