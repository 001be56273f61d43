//! What containerd publishes about tasks, as `ctr events` shows it.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use containerd_client::events::{TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOom, TaskStart};
use containerd_client::services::v1::events_client::EventsClient;
use containerd_client::services::v1::{PublishRequest, SubscribeRequest};
use containerd_client::tonic::Request;
use containerd_client::with_namespace;
use prost::Message;
use prost_types::Any;

use crate::node::Node;

const PROBE: &str = "/kubeception/subscribed";

/// One event about a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Without the leading `/tasks/`: `create`, `start`, `exit`, `delete`, `exec-added`, `exec-started`, `oom`.
    pub kind: String,
    pub container_id: String,
    /// Of an exec; empty for the container's own process.
    pub exec_id: String,
    pub pid: u32,
    pub exit_status: u32,
}

/// A subscription; events that were published since it was made are kept until they are taken.
#[derive(Debug)]
pub struct Events {
    received: Receiver<Event>,
    /// Dropped, it ends the subscription.
    _stop: tokio::sync::oneshot::Sender<()>,
}

impl Events {
    /// Subscribes; events published after the return are seen.
    pub fn subscribe(node: &Node) -> Result<Self> {
        let socket = node.place().socket();
        let (sender, received) = channel();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let (ready, subscribed) = channel::<Result<()>>();
        std::thread::Builder::new().name("events".to_owned()).spawn(move || {
            let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => {
                    let _ = ready.send(Err(error.into()));
                    return;
                }
            };
            runtime.block_on(async {
                let outcome = tokio::select! {
                    outcome = follow(socket, &ready, &sender) => outcome,
                    _ = stopped => Ok(()),
                };
                if let Err(error) = outcome {
                    // Of an error after that nobody waits any more; the end of containerd is one.
                    let _ = ready.send(Err(error));
                }
            });
        })?;
        subscribed
            .recv_timeout(Duration::from_secs(10))
            .context("subscribing to events")??;
        Ok(Self { received, _stop: stop })
    }

    /// Takes events of the given containers until one satisfies the condition, and answers all of them.
    pub fn take_until(
        &self,
        containers: &[&str],
        bound: Duration,
        mut last: impl FnMut(&Event) -> bool,
    ) -> Result<Vec<Event>> {
        let deadline = Instant::now() + bound;
        let mut taken = Vec::new();
        loop {
            match self
                .received
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            {
                Ok(event) if containers.contains(&event.container_id.as_str()) => {
                    let end = last(&event);
                    taken.push(event);
                    if end {
                        return Ok(taken);
                    }
                }
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => {
                    bail!(
                        "the event did not come within {} s; those that came: {taken:?}",
                        bound.as_secs()
                    )
                }
                Err(RecvTimeoutError::Disconnected) => bail!("the subscription ended; events that came: {taken:?}"),
            }
        }
    }
}

/// Hands events on until the subscription ends. A subscription is answered only by its first event, so one of our own is
/// published until it arrives.
async fn follow(socket: PathBuf, ready: &Sender<Result<()>>, sender: &Sender<Event>) -> Result<()> {
    let channel = containerd_client::connect(socket).await?;
    let (mut client, mut publisher) = (EventsClient::new(channel.clone()), EventsClient::new(channel));
    let filters = vec![
        "namespace==k8s.io,topic~=\"^/tasks/\"".to_owned(),
        format!("topic==\"{PROBE}\""),
    ];
    let subscribe = client.subscribe(SubscribeRequest { filters });
    let publish = async {
        loop {
            let event = Any {
                type_url: "types.kubeception/probe".to_owned(),
                value: Vec::new(),
            };
            let request = PublishRequest {
                topic: PROBE.to_owned(),
                event: Some(event),
            };
            if let Err(status) = publisher.publish(with_namespace!(request, "k8s.io")).await {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let mut stream = tokio::select! {
        response = subscribe => response?.into_inner(),
        status = publish => return Err(status).context("publishing an event"),
    };
    let _ = ready.send(Ok(()));
    while let Some(envelope) = stream.message().await? {
        let Some(event) = envelope.event.and_then(|any| decode(&envelope.topic, &any)) else {
            continue;
        };
        if sender.send(event).is_err() {
            break;
        }
    }
    Ok(())
}

fn decode(topic: &str, any: &Any) -> Option<Event> {
    let kind = topic.strip_prefix("/tasks/")?;
    let bytes = any.value.as_slice();
    let (container_id, exec_id, pid, exit_status) = match kind {
        "create" => TaskCreate::decode(bytes).map(|event| (event.container_id, String::new(), event.pid, 0)),
        "start" => TaskStart::decode(bytes).map(|event| (event.container_id, String::new(), event.pid, 0)),
        // The id of a container's own process is the container's.
        "exit" => TaskExit::decode(bytes).map(|event| {
            let exec_id = if event.id == event.container_id {
                String::new()
            } else {
                event.id
            };
            (event.container_id, exec_id, event.pid, event.exit_status)
        }),
        "delete" => TaskDelete::decode(bytes).map(|event| (event.container_id, event.id, event.pid, event.exit_status)),
        "exec-added" => TaskExecAdded::decode(bytes).map(|event| (event.container_id, event.exec_id, 0, 0)),
        "exec-started" => TaskExecStarted::decode(bytes).map(|event| (event.container_id, event.exec_id, event.pid, 0)),
        "oom" => TaskOom::decode(bytes).map(|event| (event.container_id, String::new(), 0, 0)),
        _ => return None,
    }
    .ok()?;
    Some(Event {
        kind: kind.to_owned(),
        container_id,
        exec_id,
        pid,
        exit_status,
    })
}
