//! Sandbox life cycle on the host: state, monitor, storage, logs.
