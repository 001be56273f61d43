//! The socket's side of the share: FUSE requests come in back to back, replies go out in their order.
//!
//! virtiofsd's server takes its requests from a virtio queue in a guest's memory. Here that memory is this process's own and
//! private: it holds a queue of two descriptors, one reply, and requests as they were read. A request is served where the
//! socket put it, and a reply is sent from where the file system put it, so that data is never copied in between.

use std::{
    io::{self, ErrorKind},
    os::{
        fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
};

use rustix::net::{SocketType, getpeername, sockopt::socket_type};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::{Queue, QueueOwnedT, QueueT, desc::split::Descriptor};
use virtiofsd::{
    descriptor_utils::{self, Reader, Writer},
    filesystem::FileSystem,
    fuse::{BatchForgetIn, ForgetOne, InHeader, Opcode, OutHeader, ReadIn, WriteIn},
    server::Server,
};
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, ReadVolatile, VolatileMemoryError,
    WriteVolatile,
};

/// Bytes of data in one request or reply, as virtiofsd's server tells the guest's kernel in its reply to INIT (`max_write`).
const MOST_DATA: u32 = 1 << 20;
/// Bytes of a whole request or reply: the data, and more than any header needs. virtiofsd's bound for requests.
pub(crate) const LONGEST: u32 = MOST_DATA + 0x1000;

// Where things are in the memory.
const DESCRIPTORS: u64 = 0;
const AVAILABLE_RING: u64 = 0x40;
const REPLY: u64 = 0x1000;
const REQUESTS: u64 = REPLY + LONGEST as u64;
const MEMORY: usize = (REQUESTS + LONGEST as u64) as usize;

/// The connection cannot be served on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectionError {
    #[error("descriptor {number} is no connected stream socket")]
    NoConnection {
        number: RawFd,
        #[source]
        source: io::Error,
    },
    #[error("preparing the socket failed")]
    Socket(#[source] io::Error),
    #[error("making the memory for requests and replies failed")]
    Memory(#[source] vm_memory::mmap::FromRangesError),
    #[error("making the queue for requests and replies failed")]
    Queue(#[source] virtio_queue::Error),
    #[error("the memory for requests and replies was missed")]
    Access(#[from] GuestMemoryError),
    #[error("laying out a request and its reply failed")]
    Layout(#[from] descriptor_utils::Error),
    #[error("the queue is empty right after a request was put into it")]
    Empty,
    #[error("reading from the guest failed")]
    Read(#[source] io::Error),
    #[error("writing to the guest failed")]
    Write(#[source] io::Error),
    #[error("the guest sent a request of {0} bytes, where {least} to {LONGEST} are possible", least = size_of::<InHeader>())]
    Length(u32),
    #[error("the guest closed the connection in the middle of a request")]
    Truncated,
    #[error("the guest wants {told} bytes written and sent {sent}")]
    WriteSize { told: u32, sent: u32 },
    #[error("the guest forgets {told} nodes in a request of {length} bytes")]
    Forgets { told: u32, length: u32 },
    #[error("the guest sent a malformed request of kind {opcode}")]
    Malformed {
        opcode: u32,
        #[source]
        source: virtiofsd::Error,
    },
}

/// The descriptor `number`, given by whoever started this process. To be called once for a number.
///
/// # Errors
/// When it is something else than a connected stream socket.
pub(crate) fn inherited(number: RawFd) -> Result<OwnedFd, ConnectionError> {
    // SAFETY: a system call on the descriptor, which nothing in this process closes meanwhile; one that is not open is an error.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    let connected = || {
        if socket_type(borrowed)? == SocketType::STREAM {
            getpeername(borrowed).map(drop)
        } else {
            Err(rustix::io::Errno::PROTOTYPE)
        }
    };
    connected().map_err(|error| ConnectionError::NoConnection {
        number,
        source: error.into(),
    })?;
    // SAFETY: it is open, see above, and was left to this process as its own.
    let socket = UnixStream::from(unsafe { OwnedFd::from_raw_fd(number) });
    socket.set_nonblocking(false).map_err(ConnectionError::Socket)?;
    Ok(socket.into())
}

/// A request, as it lies in the memory.
#[derive(Debug, Clone, Copy)]
struct Request {
    header: InHeader,
    address: u64,
}

/// The connection to the guest.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: UnixStream,
    memory: GuestMemoryMmap<BitmapMmapRegion>,
    queue: Queue,
    /// What was read and not yet served, as offsets from [`REQUESTS`].
    start: u32,
    end: u32,
}

impl Connection {
    /// # Errors
    /// When there is no memory.
    pub(crate) fn new(socket: OwnedFd) -> Result<Self, ConnectionError> {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).map_err(ConnectionError::Memory)?;
        // A queue whose driver has made one chain available, the one that begins with descriptor 0: flags, index, ring.
        memory.write_obj([0_u16, 1, 0, 0], GuestAddress(AVAILABLE_RING))?;
        let queue = || {
            let mut queue = Queue::new(2)?;
            queue.try_set_desc_table_address(GuestAddress(DESCRIPTORS))?;
            queue.try_set_avail_ring_address(GuestAddress(AVAILABLE_RING))?;
            queue.set_ready(true);
            Ok(queue)
        };
        Ok(Self {
            socket: socket.into(),
            memory,
            queue: queue().map_err(ConnectionError::Queue)?,
            start: 0,
            end: 0,
        })
    }

    /// Serves requests, one after the other, until the guest's side closes the connection.
    ///
    /// # Errors
    /// When the guest does not keep to the protocol, or the connection breaks.
    pub(crate) fn serve<F: FileSystem + Sync>(&mut self, server: &Server<F>) -> Result<(), ConnectionError> {
        while let Some(request) = self.next()? {
            if request.header.opcode == Opcode::BatchForget as u32 {
                self.forget(server, request)?;
                continue;
            }
            let reply = self.answer(server, request)?;
            if reply > 0 && !self.send(reply)? {
                break;
            }
        }
        Ok(())
    }

    /// The next request, read as far as needed; None when the connection was closed after the last one.
    fn next(&mut self) -> Result<Option<Request>, ConnectionError> {
        loop {
            let held = self.end - self.start;
            if held as usize >= size_of::<InHeader>() {
                let address = REQUESTS + u64::from(self.start);
                let header: InHeader = self.memory.read_obj(GuestAddress(address))?;
                if (header.len as usize) < size_of::<InHeader>() || header.len > LONGEST {
                    return Err(ConnectionError::Length(header.len));
                }
                if header.len <= held {
                    self.start += header.len;
                    return Ok(Some(Request { header, address }));
                }
            }
            if !self.fill()? {
                return if held == 0 {
                    Ok(None)
                } else {
                    Err(ConnectionError::Truncated)
                };
            }
        }
    }

    /// Reads what there is, by one system call; false when the connection is closed.
    fn fill(&mut self) -> Result<bool, ConnectionError> {
        let held = (self.end - self.start) as usize;
        if self.start > 0 && held > 0 {
            let from = self
                .memory
                .get_slice(GuestAddress(REQUESTS + u64::from(self.start)), held)?;
            from.copy_to_volatile_slice(self.memory.get_slice(GuestAddress(REQUESTS), held)?);
        }
        (self.start, self.end) = (0, self.end - self.start);
        let room = LONGEST - self.end;
        let mut free = self
            .memory
            .get_slice(GuestAddress(REQUESTS + u64::from(self.end)), room as usize)?;
        loop {
            match self.socket.read_volatile(&mut free) {
                Ok(count) => {
                    self.end += u32::try_from(count).map_or(room, |count| count.min(room));
                    return Ok(count > 0);
                }
                Err(error) => match plain(error) {
                    error if error.kind() == ErrorKind::Interrupted => {}
                    error if error.kind() == ErrorKind::ConnectionReset => return Ok(false),
                    error => return Err(ConnectionError::Read(error)),
                },
            }
        }
    }

    /// Lets the server answer a request; the length of the reply, 0 when there is none.
    fn answer<F: FileSystem + Sync>(&mut self, server: &Server<F>, request: Request) -> Result<usize, ConnectionError> {
        let Request { header, address } = request;
        let room = self.room_for_reply(request)?;
        let descriptors = [
            Descriptor::new(address, header.len, VRING_DESC_F_NEXT as u16, 1),
            Descriptor::new(REPLY, room, VRING_DESC_F_WRITE as u16, 0),
        ];
        for (descriptor, place) in descriptors.into_iter().zip([DESCRIPTORS, DESCRIPTORS + 16]) {
            self.memory.write_obj(descriptor, GuestAddress(place))?;
        }
        // The same chain again.
        self.queue.set_next_avail(0);
        let chain = self
            .queue
            .iter(&self.memory)
            .map_err(ConnectionError::Queue)?
            .next()
            .ok_or(ConnectionError::Empty)?;
        let reader = Reader::new(&self.memory, chain.clone())?;
        let writer = Writer::new(&self.memory, chain)?;
        server
            .handle_message(reader, writer, None::<&mut ()>)
            .map_err(|source| ConnectionError::Malformed {
                opcode: header.opcode,
                source,
            })
    }

    /// Serves a BATCH_FORGET, which has no reply; it has no number of its own either, so that an error in its place would be
    /// taken for something else. The kernel fills its reader's buffer with what it forgets, which may be a little more than
    /// virtiofsd takes at once: it gets it in parts, each of which has its head where the last part's end was.
    fn forget<F: FileSystem + Sync>(&mut self, server: &Server<F>, request: Request) -> Result<(), ConnectionError> {
        const HEAD: u32 = (size_of::<InHeader>() + size_of::<BatchForgetIn>()) as u32;
        const ONE: u32 = size_of::<ForgetOne>() as u32;
        let Request { header, mut address } = request;
        let body = |address| GuestAddress(address + size_of::<InHeader>() as u64);
        let mut left = match header.len.checked_sub(HEAD) {
            Some(_) => self.memory.read_obj::<BatchForgetIn>(body(address))?.count,
            None => 0,
        };
        if left.checked_mul(ONE).and_then(|length| length.checked_add(HEAD)) != Some(header.len) {
            return Err(ConnectionError::Forgets {
                told: left,
                length: header.len,
            });
        }
        while left > 0 {
            let count = left.min(MOST_DATA / ONE);
            let header = InHeader {
                len: HEAD + count * ONE,
                ..header
            };
            self.memory.write_obj(header, GuestAddress(address))?;
            self.memory
                .write_obj(BatchForgetIn { count, dummy: 0 }, body(address))?;
            self.answer(server, Request { header, address })?;
            address += u64::from(count * ONE);
            left -= count;
        }
        Ok(())
    }

    /// Bytes that the reply may have. virtiofsd reads as much of a file as there is room, for a virtio driver leaves no more
    /// room than it wants to have read; and it writes all data that a request has, whatever the request says.
    fn room_for_reply(&self, request: Request) -> Result<u32, ConnectionError> {
        let body = GuestAddress(request.address + size_of::<InHeader>() as u64);
        let length = request.header.len as usize - size_of::<InHeader>();
        if request.header.opcode == Opcode::Read as u32 && length >= size_of::<ReadIn>() {
            let read: ReadIn = self.memory.read_obj(body)?;
            return Ok(size_of::<OutHeader>() as u32 + read.size.min(MOST_DATA));
        }
        if request.header.opcode == Opcode::Write as u32 && length >= size_of::<WriteIn>() {
            let told = self.memory.read_obj::<WriteIn>(body)?.size;
            let sent = request.header.len - (size_of::<InHeader>() + size_of::<WriteIn>()) as u32;
            if told != sent {
                return Err(ConnectionError::WriteSize { told, sent });
            }
        }
        Ok(LONGEST)
    }

    /// Sends the reply; false when nobody is there to read it.
    fn send(&mut self, length: usize) -> Result<bool, ConnectionError> {
        let reply = self.memory.get_slice(GuestAddress(REPLY), length)?;
        match self.socket.write_all_volatile(&reply).map_err(plain) {
            Ok(()) => Ok(true),
            Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => Ok(false),
            Err(error) => Err(ConnectionError::Write(error)),
        }
    }
}

fn plain(error: VolatileMemoryError) -> io::Error {
    match error {
        VolatileMemoryError::IOError(error) => error,
        error => io::Error::other(error),
    }
}
