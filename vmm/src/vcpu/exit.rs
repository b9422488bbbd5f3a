//! The meaning of each exit from the guest. A pure function: it touches nothing but the exit and the buses.

use kvm_ioctls::VcpuExit;

use crate::bus::Bus;

/// What the vCPU's thread does next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// Enter the guest again.
    Enter,
    /// A signal interrupted the guest: look whether somebody wants something.
    Interrupted,
    /// The vCPU cannot go on.
    Crash(Cause),
}

/// Why a vCPU cannot go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    /// An exception while handling an exception while handling an exception, or a processor shutdown of another kind.
    TripleFault,
    /// KVM met something it cannot do.
    InternalError,
    /// The processor refused to enter the guest, for this hardware reason.
    FailedEntry(u64),
    /// KVM_RUN failed with this error number.
    RunFailed(i32),
    /// An exit that a machine of this kind cannot have.
    Unexpected(String),
}

/// Handles one exit.
pub fn dispatch(exit: Result<VcpuExit<'_>, kvm_ioctls::Error>, ports: &Bus, mmio: &Bus) -> Next {
    match exit {
        Ok(VcpuExit::IoOut(port, data)) => ports.write(u64::from(port), data),
        Ok(VcpuExit::IoIn(port, data)) => ports.read(u64::from(port), data),
        Ok(VcpuExit::MmioWrite(address, data)) => mmio.write(address, data),
        Ok(VcpuExit::MmioRead(address, data)) => mmio.read(address, data),
        Ok(VcpuExit::Intr) => return Next::Interrupted,
        Ok(VcpuExit::Shutdown) => return Next::Crash(Cause::TripleFault),
        Ok(VcpuExit::InternalError) => return Next::Crash(Cause::InternalError),
        Ok(VcpuExit::FailEntry(reason, _)) => return Next::Crash(Cause::FailedEntry(reason)),
        Ok(other) => return Next::Crash(Cause::Unexpected(format!("{other:?}"))),
        Err(error) => match error.errno() {
            libc::EINTR | libc::EAGAIN => return Next::Interrupted,
            number => return Next::Crash(Cause::RunFailed(number)),
        },
    }
    Next::Enter
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::bus::BusDevice;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn accesses_reach_their_bus() {
        let (port, register) = (Arc::new(Recorder::default()), Arc::new(Recorder::default()));
        let (mut ports, mut mmio) = (Bus::default(), Bus::default());
        ports.insert(0x3f8, 8, Arc::clone(&port) as Arc<dyn BusDevice>);
        mmio.insert(0xd000_0000, 0x1000, Arc::clone(&register) as Arc<dyn BusDevice>);

        assert_eq!(dispatch(Ok(VcpuExit::IoOut(0x3f9, &[7])), &ports, &mmio), Next::Enter);
        assert_eq!(dispatch(Ok(VcpuExit::MmioWrite(0xd000_0010, &[1, 2])), &ports, &mmio), Next::Enter);
        assert_eq!(*port.0.lock().unwrap(), [(1, vec![7])]);
        assert_eq!(*register.0.lock().unwrap(), [(0x10, vec![1, 2])]);

        let mut data = [0; 2];
        dispatch(Ok(VcpuExit::IoIn(0x3fa, &mut data)), &ports, &mmio);
        assert_eq!(data, [2, 2]);
        dispatch(Ok(VcpuExit::MmioRead(0xd000_2000, &mut data)), &ports, &mmio);
        assert_eq!(data, [0xff, 0xff]);
    }

    #[test]
    fn only_errors_are_crashes() {
        let (ports, mmio) = (Bus::default(), Bus::default());
        let meaning = |exit| dispatch(exit, &ports, &mmio);
        assert_eq!(meaning(Ok(VcpuExit::Intr)), Next::Interrupted);
        assert_eq!(meaning(Err(kvm_ioctls::Error::new(libc::EINTR))), Next::Interrupted);
        assert_eq!(meaning(Ok(VcpuExit::Shutdown)), Next::Crash(Cause::TripleFault));
        assert_eq!(meaning(Ok(VcpuExit::InternalError)), Next::Crash(Cause::InternalError));
        assert_eq!(meaning(Ok(VcpuExit::FailEntry(9, 0))), Next::Crash(Cause::FailedEntry(9)));
        assert_eq!(
            meaning(Err(kvm_ioctls::Error::new(libc::EFAULT))),
            Next::Crash(Cause::RunFailed(libc::EFAULT))
        );
        assert!(matches!(meaning(Ok(VcpuExit::Hlt)), Next::Crash(Cause::Unexpected(_))));
    }
}
