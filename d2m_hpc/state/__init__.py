"""What lies on the shared filesystem: paths, records, leases. No third party but filelock."""
