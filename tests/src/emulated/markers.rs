//! Tells the emulated host's markers from the output between them. Markers are what `tests/host/init` prints:
//! `\x1eready\n` and `\x1estatus N\n`.

/// One thing the host said.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// Bytes that the command wrote.
    Output(Vec<u8>),
    /// The host waits for a command.
    Ready,
    /// The command ended with this status.
    Status(i32),
}

const START: u8 = 0x1e;
/// No marker is longer; a start byte without an end in this distance is output.
const LONGEST: usize = 16;

/// Cuts a stream of bytes into [`Event`]s, wherever the pieces it comes in begin and end.
#[derive(Debug, Default)]
pub struct Splitter {
    held: Vec<u8>,
}

impl Splitter {
    /// Takes the next piece and answers what is complete.
    pub fn push(&mut self, piece: &[u8]) -> Vec<Event> {
        self.held.extend_from_slice(piece);
        let mut events = Vec::new();
        let mut output = Vec::new();
        let mut rest = self.held.as_slice();
        loop {
            let Some(start) = rest.iter().position(|byte| *byte == START) else {
                output.extend_from_slice(rest);
                rest = &[];
                break;
            };
            let (before, marked) = rest.split_at(start);
            output.extend_from_slice(before);
            let line = marked
                .iter()
                .take(LONGEST)
                .position(|byte| *byte == b'\n')
                .map(|end| marked.split_at(end + 1));
            match line.and_then(|(line, after)| marker(line).map(|event| (event, after))) {
                Some((event, after)) => {
                    if !output.is_empty() {
                        events.push(Event::Output(std::mem::take(&mut output)));
                    }
                    events.push(event);
                    rest = after;
                }
                None if line.is_none() && marked.len() < LONGEST => {
                    rest = marked;
                    break;
                }
                None => {
                    output.push(START);
                    rest = marked.get(1..).unwrap_or_default();
                }
            }
        }
        if !output.is_empty() {
            events.push(Event::Output(output));
        }
        self.held = rest.to_vec();
        events
    }
}

fn marker(line: &[u8]) -> Option<Event> {
    let words = std::str::from_utf8(line).ok()?.strip_prefix('\x1e')?.strip_suffix('\n')?;
    match words.strip_prefix("status ") {
        Some(number) => number.parse().ok().map(Event::Status),
        None => (words == "ready").then_some(Event::Ready),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Joins neighbouring output, so that results do not depend on where pieces ended.
    fn joined(events: Vec<Event>) -> Vec<Event> {
        let mut all: Vec<Event> = Vec::new();
        for event in events {
            match (all.last_mut(), event) {
                (Some(Event::Output(before)), Event::Output(more)) => before.extend(more),
                (_, event) => all.push(event),
            }
        }
        all
    }

    #[test]
    fn markers_are_found_wherever_the_pieces_end() {
        let stream = b"a\n\x1eready\nb\x1e\x1estatus 137\n\x1enot a marker\n\x1estatus x\nend\x1estatus 0\n";
        let whole = joined(Splitter::default().push(stream));
        assert_eq!(
            whole,
            [
                Event::Output(b"a\n".to_vec()),
                Event::Ready,
                Event::Output(b"b\x1e".to_vec()),
                Event::Status(137),
                Event::Output(b"\x1enot a marker\n\x1estatus x\nend".to_vec()),
                Event::Status(0),
            ]
        );
        for size in 1..stream.len() {
            let mut splitter = Splitter::default();
            let pieces = stream.chunks(size).flat_map(|piece| splitter.push(piece)).collect();
            assert_eq!(joined(pieces), whole, "pieces of {size}");
        }
    }
}
