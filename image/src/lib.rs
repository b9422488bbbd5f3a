//! OCI image store: load, pull, EROFS conversion, garbage collection.
