//! OCI indexes and manifests.
