//! For tests: a vhost-user backend in this process, which answers each request with its bytes in reverse order.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;

use vhost::vhost_user::message::*;
use vhost::vhost_user::{
    BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut, VhostUserProtocolFeatures,
};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::devices::virtio::F_COMMON;
use crate::devices::virtio::queue::{self, Buffers};

/// Two queues of at most this size.
pub const QUEUE_SIZE: u16 = 64;

#[derive(Default)]
pub struct Backend {
    without: u64,
    /// What it knows of the guest; none: it cannot save that.
    knows: Option<Arc<Mutex<Vec<u8>>>>,
    memory: Option<Arc<GuestMemoryMmap<()>>>,
    regions: Vec<VhostUserMemoryRegion>,
    rings: [Ring; 2],
}

#[derive(Default)]
struct Ring {
    size: u32,
    /// Descriptors, available, used: addresses in the frontend.
    addresses: (u64, u64, u64),
    kick: Option<File>,
    call: Option<File>,
    /// The entry that comes next.
    base: u16,
    stop: Option<(File, thread::JoinHandle<u16>)>,
}

/// Serves the other end until the connection is closed.
pub fn serve(stream: UnixStream, backend: Backend) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let backend = Arc::new(Mutex::new(backend));
        let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(&backend));
        while handler.handle_request().is_ok() {}
        for ring in &mut backend.lock().unwrap().rings {
            ring.stop();
        }
    })
}

impl Backend {
    /// One that lacks these features.
    pub fn without(features: u64) -> Self {
        Self { without: features, ..Self::default() }
    }

    /// One that can save what it knows of the guest.
    pub fn knowing(what: Arc<Mutex<Vec<u8>>>) -> Self {
        Self { knows: Some(what), ..Self::default() }
    }

    fn guest_address(&self, address: u64) -> Option<u64> {
        let inside = |region: &&VhostUserMemoryRegion| {
            let (start, size) = (region.user_addr, region.memory_size);
            (start..start + size).contains(&address)
        };
        self.regions.iter().find(inside).map(|region| region.guest_phys_addr + (address - region.user_addr))
    }

    fn ring(&mut self, index: u32) -> Result<&mut Ring> {
        self.rings.get_mut(index as usize).ok_or(Error::InvalidParam)
    }

    fn run(&mut self, index: u32) -> Result<()> {
        let memory = self.memory.clone().ok_or(Error::InvalidOperation("no memory"))?;
        let (descriptors, available, used) = self.ring(index)?.addresses;
        let translate = |address| self.guest_address(address).ok_or(Error::InvalidParam);
        let (descriptors, available, used) =
            (translate(descriptors)?, translate(available)?, translate(used)?);
        let ring = self.ring(index)?;
        let mut queue = Queue::new(QUEUE_SIZE).map_err(|_| Error::InvalidParam)?;
        queue.set_size(ring.size as u16);
        queue.set_desc_table_address(Some(descriptors as u32), Some((descriptors >> 32) as u32));
        queue.set_avail_ring_address(Some(available as u32), Some((available >> 32) as u32));
        queue.set_used_ring_address(Some(used as u32), Some((used >> 32) as u32));
        queue.set_next_avail(ring.base);
        let used = queue.used_idx(memory.as_ref(), std::sync::atomic::Ordering::Acquire);
        queue.set_next_used(used.map_err(|_| Error::InvalidParam)?.0);
        queue.set_ready(true);
        let kick = ring.kick.as_ref().and_then(|kick| kick.try_clone().ok()).ok_or(Error::IncorrectFds)?;
        let call = ring.call.as_ref().and_then(|call| call.try_clone().ok()).ok_or(Error::IncorrectFds)?;
        let (stop, stopped) = UnixStream::pair().map_err(Error::ReqHandlerError)?;
        let thread = thread::spawn(move || work(&memory, queue, &kick, call, &stopped));
        ring.stop = Some((File::from(std::os::fd::OwnedFd::from(stop)), thread));
        Ok(())
    }
}

impl Ring {
    fn stop(&mut self) {
        if let Some((stop, thread)) = self.stop.take() {
            drop(stop);
            self.base = thread.join().unwrap();
        }
    }
}

fn work(
    memory: &GuestMemoryMmap<()>,
    mut queue: Queue,
    kick: &File,
    mut call: File,
    stop: &UnixStream,
) -> u16 {
    loop {
        let poll = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut fds = [poll(kick.as_raw_fd()), poll(stop.as_raw_fd())];
        // SAFETY: two initialised entries, as many as are said to be there.
        unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) };
        if fds[1].revents != 0 {
            return queue.next_avail();
        }
        let _ = std::io::Read::read(&mut &*kick, &mut [0; 8]);
        // A guest that breaks the rules gets no answer.
        while let Some(chain) = queue.iter(memory).ok().and_then(|mut chains| chains.next()) {
            let head = chain.head_index();
            let Ok(buffers) = Buffers::of(memory, chain) else { break };
            let mut bytes = vec![0; queue::total(&buffers.readable).min(4096)];
            queue::read_exact(&buffers.readable, &mut bytes);
            bytes.reverse();
            let written = queue::write(&buffers.writable, &bytes);
            if queue.add_used(memory, head, written as u32).is_err() {
                break;
            }
            let _ = call.write(&1_u64.to_ne_bytes());
        }
    }
}

impl VhostUserBackendReqHandlerMut for Backend {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }
    fn reset_owner(&mut self) -> Result<()> {
        Ok(())
    }
    fn reset_device(&mut self) -> Result<()> {
        Ok(())
    }
    fn get_features(&mut self) -> Result<u64> {
        Ok((F_COMMON | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()) & !self.without)
    }
    fn set_features(&mut self, _: u64) -> Result<()> {
        Ok(())
    }
    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let map = |(region, file): (&VhostUserMemoryRegion, File)| {
            let offset = FileOffset::new(file, region.mmap_offset);
            let mapping = MmapRegion::from_file(offset, region.memory_size as usize).unwrap();
            GuestRegionMmap::new(mapping, GuestAddress(region.guest_phys_addr)).unwrap()
        };
        let mapped = regions.iter().zip(files).map(map).collect();
        self.memory = Some(Arc::new(GuestMemoryMmap::from_regions(mapped).unwrap()));
        self.regions = regions.to_vec();
        Ok(None)
    }
    fn set_vring_num(&mut self, index: u32, size: u32) -> Result<()> {
        self.ring(index)?.size = size;
        Ok(())
    }
    fn set_vring_addr(
        &mut self,
        index: u32,
        _: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _: u64,
    ) -> Result<()> {
        self.ring(index)?.addresses = (descriptors, available, used);
        Ok(())
    }
    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.ring(index)?.base = base as u16;
        Ok(())
    }
    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let ring = self.ring(index)?;
        ring.stop();
        Ok(VhostUserVringState::new(index, ring.base.into()))
    }
    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.ring(index.into())?.kick = fd;
        Ok(())
    }
    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.ring(index.into())?.call = fd;
        Ok(())
    }
    fn set_vring_err(&mut self, _: u8, _: Option<File>) -> Result<()> {
        Ok(())
    }
    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        let all = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
        Ok(if self.knows.is_some() { all | VhostUserProtocolFeatures::DEVICE_STATE } else { all })
    }
    fn set_protocol_features(&mut self, _: u64) -> Result<()> {
        Ok(())
    }
    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(2)
    }
    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.ring(index)?.stop();
        if enable { self.run(index) } else { Ok(()) }
    }
    fn get_config(&mut self, _: u32, _: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        Err(Error::InvalidMessage)
    }
    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        Err(Error::InvalidMessage)
    }
    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        Err(Error::InvalidMessage)
    }
    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidMessage)
    }
    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(Error::InvalidMessage)
    }
    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> Result<()> {
        Err(Error::InvalidMessage)
    }
    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Err(Error::InvalidMessage)
    }
    fn add_mem_region(
        &mut self,
        _: &VhostUserSingleMemoryRegion,
        _: File,
        _: Option<bool>,
    ) -> Result<Option<u64>> {
        Err(Error::InvalidMessage)
    }
    fn remove_mem_region(&mut self, _: &VhostUserSingleMemoryRegion) -> Result<()> {
        Err(Error::InvalidMessage)
    }
    fn set_device_state_fd(
        &mut self,
        direction: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        mut file: File,
    ) -> Result<Option<File>> {
        let mut knows = self.knows.as_ref().ok_or(Error::InvalidMessage)?.lock().unwrap();
        let done = match direction {
            VhostTransferStateDirection::SAVE => file.write_all(&knows),
            VhostTransferStateDirection::LOAD => {
                knows.clear();
                std::io::Read::read_to_end(&mut file, &mut knows).map(drop)
            }
        };
        done.map(|()| None).map_err(Error::ReqHandlerError)
    }
    fn check_device_state(&mut self) -> Result<()> {
        match &self.knows {
            Some(knows) if *knows.lock().unwrap() != b"nonsense" => Ok(()),
            _ => Err(Error::InvalidMessage),
        }
    }
    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidMessage)
    }
    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        Err(Error::InvalidMessage)
    }
}
