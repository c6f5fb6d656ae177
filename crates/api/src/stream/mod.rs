//! Streams between people and guests: WebSocket on their side, a stream of the agent's tunnel on the other.

mod bytes;
mod guest;
mod images;
mod logs;
mod relay;
mod tunnel;

pub(crate) use self::guest::{console, exec, forward, vnc};
pub(crate) use self::images::{image_for_node, upload};
pub(crate) use self::logs::logs;
pub(crate) use self::tunnel::{Tunnels, tunnel};
