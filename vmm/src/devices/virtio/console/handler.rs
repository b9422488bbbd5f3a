//! Moves bytes between the guest's console queues and the host.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::input::Input;
use super::metrics::Metrics;
use crate::devices::console_output::Outlet;
use crate::devices::virtio::queue::{self, Buffers, DeviceQueue};
use crate::devices::virtio::{GuestError, Progress};
use crate::memory::GuestMemory;

/// Most bytes of one descriptor chain that are printed.
const MAX_OUTPUT: usize = 64 * 1024;

/// The active half of the console.
#[derive(Debug)]
pub struct Handler {
    /// Memory, receive queue (input), transmit queue (output) while the driver is ready.
    pub(super) queues: Option<(Arc<GuestMemory>, DeviceQueue, DeviceQueue)>,
    pub(super) outlet: Outlet,
    pub(super) input: Option<Input>,
    pub(super) metrics: Arc<Metrics>,
}

impl Handler {
    /// Prints what the guest wrote, at most one round of the ring.
    ///
    /// # Errors
    /// When the guest breaks the rules.
    pub fn transmit(&mut self) -> Result<Progress, GuestError> {
        let Some((memory, _, transmit)) = &mut self.queues else { return Ok(Progress::Done) };
        for _ in 0..transmit.size() {
            let Some(chain) = transmit.pop(memory)? else {
                transmit.notify(memory)?;
                if transmit.enable_kicks(memory)? {
                    continue;
                }
                return Ok(Progress::Done);
            };
            let head = chain.head_index();
            let buffers = Buffers::of(memory, chain)?;
            let mut bytes = vec![0; queue::total(&buffers.readable).min(MAX_OUTPUT)];
            if queue::read_exact(&buffers.readable, &mut bytes).is_some() {
                // An outlet never fails.
                let _ = self.outlet.write(&bytes);
                self.metrics.output_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            }
            transmit.push(memory, head, 0)?;
        }
        transmit.notify(memory)?;
        Ok(Progress::More)
    }

    /// Gives the guest input, as much as there is and as it has buffers for.
    ///
    /// # Errors
    /// When the guest breaks the rules.
    pub fn receive(&mut self) -> Result<Progress, GuestError> {
        let (Some((memory, receive, _)), Some(input)) = (&mut self.queues, &mut self.input) else {
            return Ok(Progress::Done);
        };
        for _ in 0..receive.size() {
            let Some(chain) = receive.pop(memory)? else {
                receive.notify(memory)?;
                if receive.enable_kicks(memory)? {
                    continue;
                }
                return Ok(Progress::Done);
            };
            let head = chain.head_index();
            let buffers = Buffers::of(memory, chain)?;
            let bytes = input.read(queue::total(&buffers.writable));
            if bytes.is_empty() {
                receive.undo_pop();
                receive.notify(memory)?;
                return Ok(Progress::Done);
            }
            let written = queue::write(&buffers.writable, &bytes);
            self.metrics.input_bytes.fetch_add(written as u64, Ordering::Relaxed);
            receive.push(memory, head, written as u32)?;
        }
        receive.notify(memory)?;
        Ok(Progress::More)
    }
}
