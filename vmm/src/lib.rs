//! A KVM microVM monitor: machine, devices, control API.
