//! What containerd hears of the pod: one queue, sent in order, an event at a time, again and again until containerd has it.

use std::time::Duration;

use containerd_shim_protos::{
    api::ForwardRequest,
    events::task::{
        TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed, TaskStart,
    },
    shim::event::Envelope,
    shim_async::{Client, EventsClient},
    topics,
};
use protobuf::{Message, MessageField, well_known_types::any::Any};
use tokio::{sync::mpsc, task::JoinHandle, time::sleep};
use ttrpc::context;

use crate::clock;

/// How long one event may take to be taken.
const TAKEN: Duration = Duration::from_secs(5);
/// Pauses between attempts: containerd may be gone for as long as an admin updates it.
const PAUSES: [Duration; 4] = [
    Duration::from_millis(50),
    Duration::from_millis(200),
    Duration::from_millis(500),
    Duration::from_secs(1),
];

/// How often containerd may answer one event with an error before the event is given up, for the others wait behind it.
const REFUSALS: u32 = 30;

/// A message that is an event of containerd's API (`api/events/task.proto`), with the topic that it is published under.
pub(crate) trait TaskEvent: Message {
    const TOPIC: &'static str;
}

macro_rules! task_events {
    ($($event:ident => $topic:ident),* $(,)?) => {
        $(impl TaskEvent for $event { const TOPIC: &'static str = topics::$topic; })*
    };
}

task_events! {
    TaskCreate => TASK_CREATE_EVENT_TOPIC,
    TaskStart => TASK_START_EVENT_TOPIC,
    TaskOOM => TASK_OOM_EVENT_TOPIC,
    TaskExit => TASK_EXIT_EVENT_TOPIC,
    TaskDelete => TASK_DELETE_EVENT_TOPIC,
    TaskExecAdded => TASK_EXEC_ADDED_EVENT_TOPIC,
    TaskExecStarted => TASK_EXEC_STARTED_EVENT_TOPIC,
    TaskPaused => TASK_PAUSED_EVENT_TOPIC,
    TaskResumed => TASK_RESUMED_EVENT_TOPIC,
}

/// Where events are put. Their number is bounded by that of the processes, so the queue has no bound of its own: none is
/// ever dropped for want of space.
#[derive(Debug, Clone)]
pub(crate) struct Events {
    namespace: String,
    queue: mpsc::UnboundedSender<Envelope>,
}

impl Events {
    /// The queue's two ends. The namespace is containerd's: `k8s.io`.
    pub(crate) fn queue(namespace: &str) -> (Self, mpsc::UnboundedReceiver<Envelope>) {
        let (queue, events) = mpsc::unbounded_channel();
        let namespace = namespace.to_owned();
        (Self { namespace, queue }, events)
    }

    /// Events of what containerd does not follow by its events.
    pub(crate) fn unheard() -> Self {
        Self::queue("").0
    }

    pub(crate) fn publish<E: TaskEvent>(&self, event: &E) {
        let Ok(value) = event.write_to_bytes() else {
            return tracing::error!(topic = E::TOPIC, "an event cannot be written");
        };
        let event = Any {
            type_url: format!("containerd.events.{}", E::NAME),
            value,
            ..Default::default()
        };
        let envelope = Envelope {
            timestamp: MessageField::some(clock::now()),
            namespace: self.namespace.clone(),
            topic: E::TOPIC.to_owned(),
            event: MessageField::some(event),
            ..Default::default()
        };
        // The receiver is gone when the shim is about to be, or was never there.
        let _ = self.queue.send(envelope);
    }
}

/// Sends what is in the queue to containerd's ttrpc socket, until the queue is closed and empty.
pub(crate) fn forward(address: String, mut events: mpsc::UnboundedReceiver<Envelope>) -> JoinHandle<()> {
    tokio::spawn(async move {
        let mut containerd = None;
        while let Some(envelope) = events.recv().await {
            let topic = envelope.topic.clone();
            let request = ForwardRequest {
                envelope: MessageField::some(envelope),
                ..Default::default()
            };
            let mut pauses = PAUSES.iter().copied();
            let mut refusals = 0;
            while let Err(error) = send(&address, &mut containerd, &request).await {
                containerd = None;
                if let ttrpc::Error::RpcStatus(status) = &error
                    && status.code() != ttrpc::Code::DEADLINE_EXCEEDED
                {
                    // One that is shutting down answers with errors as well, and its successor wants the event.
                    refusals += 1;
                    if status.code() == ttrpc::Code::INVALID_ARGUMENT || refusals == REFUSALS {
                        tracing::error!(topic, error = status.message(), "containerd refuses an event");
                        break;
                    }
                }
                let pause = pauses.next().unwrap_or(PAUSES[PAUSES.len() - 1]);
                tracing::debug!(topic, %error, "containerd does not take an event; it is kept");
                sleep(pause).await;
            }
        }
    })
}

async fn send(address: &str, containerd: &mut Option<EventsClient>, request: &ForwardRequest) -> ttrpc::Result<()> {
    let client = match containerd {
        Some(client) => client,
        None => {
            let address = match address.strip_prefix("unix://") {
                Some(_) => address.to_owned(),
                None => format!("unix://{address}"),
            };
            containerd.insert(EventsClient::new(Client::connect(&address).await?))
        }
    };
    client.forward(context::with_duration(TAKEN), request).await.map(drop)
}
