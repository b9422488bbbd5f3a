//! The ttrpc wire format: a ten-byte header and a protobuf message, many requests interleaved on one connection.
//!
//! Source: containerd/ttrpc PROTOCOL.md. Only unary calls are used. Both sides treat every byte as hostile: a
//! frame's length is capped before anything is allocated for it.

use prost::Message;
use prost::encoding::{DecodeContext, decode_key, skip_field};

/// Bytes of a frame header.
pub const HEADER_LEN: usize = 10;
/// Largest payload that is accepted, in bytes: the limit of every ttrpc implementation.
pub const MAX_PAYLOAD: usize = 4 << 20;
/// Most fields of an answer, each repetition counted: twice the processes that a guest's kernel has at once unless it is told
/// otherwise.
pub const MAX_FIELDS: usize = 64 << 10;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A [`Request`].
    Request,
    /// A [`Response`].
    Response,
}

/// Why bytes are not a frame. The connection cannot be used any further.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The header announces more than [`MAX_PAYLOAD`].
    #[error("ttrpc frame of {0} bytes is over the limit of {MAX_PAYLOAD}")]
    TooLarge(usize),
    /// Neither a request nor a response: streaming, or not ttrpc at all.
    #[error("ttrpc frame of unknown type {0:#x}")]
    UnknownKind(u8),
    /// The payload is not the protobuf message it should be.
    #[error("ttrpc frame does not decode: {0}")]
    Decode(#[from] prost::DecodeError),
    /// More than [`MAX_FIELDS`].
    #[error("an answer of more than {MAX_FIELDS} fields")]
    ManyFields,
    /// Many frames that belong to no call.
    #[error("the peer sends ttrpc frames that nobody asked for")]
    Unasked,
}

/// A parsed frame header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Payload bytes that follow.
    pub length: usize,
    /// Pairs a response with its request; odd, chosen by the client.
    pub stream_id: u32,
    /// What the payload is.
    pub kind: Kind,
}

impl Header {
    /// Parses a header.
    ///
    /// # Errors
    /// [`WireError::TooLarge`] and [`WireError::UnknownKind`].
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Self, WireError> {
        let [l0, l1, l2, l3, s0, s1, s2, s3, kind, _flags] = *bytes;
        let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
        let kind = match kind {
            1 => Kind::Request,
            2 => Kind::Response,
            other => return Err(WireError::UnknownKind(other)),
        };
        if length > MAX_PAYLOAD {
            return Err(WireError::TooLarge(length));
        }
        Ok(Self { length, stream_id: u32::from_be_bytes([s0, s1, s2, s3]), kind })
    }

    fn to_bytes(self) -> [u8; HEADER_LEN] {
        let [l0, l1, l2, l3] = u32::try_from(self.length).unwrap_or(u32::MAX).to_be_bytes();
        let [s0, s1, s2, s3] = self.stream_id.to_be_bytes();
        let kind = match self.kind {
            Kind::Request => 1,
            Kind::Response => 2,
        };
        [l0, l1, l2, l3, s0, s1, s2, s3, kind, 0]
    }
}

/// A call: `ttrpc.Request`.
#[derive(Clone, PartialEq, Message)]
pub struct Request {
    /// Full service name, `package.Service`.
    #[prost(string, tag = "1")]
    pub service: String,
    /// Method name.
    #[prost(string, tag = "2")]
    pub method: String,
    /// The encoded request message.
    #[prost(bytes = "vec", tag = "3")]
    pub payload: Vec<u8>,
    /// How long the caller waits, nanoseconds; 0 is for ever.
    #[prost(int64, tag = "4")]
    pub timeout_nano: i64,
}

/// An answer: `ttrpc.Response`.
#[derive(Clone, PartialEq, Message)]
pub struct Response {
    /// Absent or code 0: success.
    #[prost(message, optional, tag = "1")]
    pub status: Option<Status>,
    /// The encoded response message.
    #[prost(bytes = "vec", tag = "2")]
    pub payload: Vec<u8>,
}

/// `google.rpc.Status`, without its details.
#[derive(Clone, PartialEq, Message)]
pub struct Status {
    /// A [`Code`].
    #[prost(int32, tag = "1")]
    pub code: i32,
    /// For people.
    #[prost(string, tag = "2")]
    pub message: String,
}

/// The `google.rpc.Code` values that are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
#[allow(missing_docs)]
pub enum Code {
    Unknown = 2,
    InvalidArgument = 3,
    DeadlineExceeded = 4,
    NotFound = 5,
    AlreadyExists = 6,
    PermissionDenied = 7,
    ResourceExhausted = 8,
    FailedPrecondition = 9,
    Aborted = 10,
    Unimplemented = 12,
    Internal = 13,
    Unavailable = 14,
}

impl Code {
    /// The code with this number; an unknown one is [`Code::Unknown`].
    #[must_use]
    pub fn from_number(number: i32) -> Self {
        match number {
            3 => Self::InvalidArgument,
            4 => Self::DeadlineExceeded,
            5 => Self::NotFound,
            6 => Self::AlreadyExists,
            7 => Self::PermissionDenied,
            8 => Self::ResourceExhausted,
            9 => Self::FailedPrecondition,
            10 => Self::Aborted,
            12 => Self::Unimplemented,
            13 => Self::Internal,
            14 => Self::Unavailable,
            _ => Self::Unknown,
        }
    }
}

impl Response {
    /// A successful answer.
    pub fn ok(message: &impl Message) -> Self {
        Self { status: None, payload: message.encode_to_vec() }
    }

    /// A refusal.
    pub fn error(code: Code, message: impl Into<String>) -> Self {
        Self { status: Some(Status { code: code as i32, message: message.into() }), payload: Vec::new() }
    }
}

/// Encodes one frame.
///
/// # Errors
/// [`WireError::TooLarge`]: the peer would refuse it.
pub fn encode(kind: Kind, stream_id: u32, message: &impl Message) -> Result<Vec<u8>, WireError> {
    let length = message.encoded_len();
    if length > MAX_PAYLOAD {
        return Err(WireError::TooLarge(length));
    }
    let mut frame = Vec::with_capacity(HEADER_LEN + length);
    frame.extend_from_slice(&Header { length, stream_id, kind }.to_bytes());
    message.encode_raw(&mut frame);
    Ok(frame)
}

/// Decodes an answer. An empty field takes two bytes of a payload and a hundred once it is decoded, so that they are counted before
/// anything is made of them. In what an agent answers, nothing is repeated inside of what is repeated.
///
/// # Errors
/// [`WireError::ManyFields`] and [`WireError::Decode`].
pub fn decode_answer<R: Message + Default>(payload: &[u8]) -> Result<R, WireError> {
    let mut rest = payload;
    let mut count = 0;
    while !rest.is_empty() {
        let (tag, kind) = decode_key(&mut rest)?;
        skip_field(kind, tag, &mut rest, DecodeContext::default())?;
        count += 1;
        if count > MAX_FIELDS {
            return Err(WireError::ManyFields);
        }
    }
    Ok(R::decode(payload)?)
}

/// Takes whole frames out of bytes that arrive in pieces.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
}

impl Decoder {
    /// Adds bytes as they came.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, `None` when more bytes are needed.
    ///
    /// # Errors
    /// As [`Header::parse`]; the connection must then be closed.
    pub fn next_frame(&mut self) -> Result<Option<(Header, Vec<u8>)>, WireError> {
        let Some(header) = self.buffer.first_chunk::<HEADER_LEN>() else { return Ok(None) };
        let header = Header::parse(header)?;
        let end = HEADER_LEN + header.length;
        if self.buffer.len() < end {
            return Ok(None);
        }
        let payload = self.buffer.get(HEADER_LEN..end).map(<[u8]>::to_vec).unwrap_or_default();
        self.buffer.drain(..end);
        Ok(Some((header, payload)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn frames_survive_any_cut(calls in prop::collection::vec((any::<u32>(), "[a-z]{0,9}", prop::collection::vec(any::<u8>(), 0..99)), 0..5),
                                  cut in 1usize..40) {
            let mut bytes = Vec::new();
            for (id, method, payload) in &calls {
                let request = Request { service: "s".into(), method: method.clone(), payload: payload.clone(), timeout_nano: 0 };
                bytes.extend(encode(Kind::Request, *id, &request).unwrap());
            }
            let mut decoder = Decoder::default();
            let mut seen = Vec::new();
            for piece in bytes.chunks(cut) {
                decoder.push(piece);
                while let Some((header, payload)) = decoder.next_frame().unwrap() {
                    let request = Request::decode(payload.as_slice()).unwrap();
                    seen.push((header.stream_id, request.method, request.payload));
                }
            }
            prop_assert_eq!(seen, calls);
        }

        #[test]
        fn noise_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut decoder = Decoder::default();
            decoder.push(&bytes);
            while let Ok(Some((_, payload))) = decoder.next_frame() {
                let _ = Request::decode(payload.as_slice());
                let _ = Response::decode(payload.as_slice());
                let _ = decode_answer::<crate::agent::ListProcessesResponse>(&payload);
            }
            let _ = decode_answer::<crate::agent::ListProcessesResponse>(&bytes);
        }
    }

    #[test]
    fn fields_are_counted_before_they_are_decoded() {
        use crate::agent::ListProcessesResponse;
        // Each is an empty process.
        let answer = |count: usize| decode_answer::<ListProcessesResponse>(&[0x0a, 0].repeat(count));
        assert_eq!(answer(MAX_FIELDS).unwrap().processes.len(), MAX_FIELDS);
        assert_eq!(answer(MAX_FIELDS + 1), Err(WireError::ManyFields));
        assert!(matches!(decode_answer::<ListProcessesResponse>(&[0x0a, 9, 0]), Err(WireError::Decode(_))));
    }

    #[test]
    fn an_absurd_length_is_refused_before_it_is_read() {
        let mut decoder = Decoder::default();
        decoder.push(&[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, 1, 0]);
        assert_eq!(decoder.next_frame(), Err(WireError::TooLarge(0xffff_ffff)));
    }
}
