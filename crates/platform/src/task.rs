//! Tasks as parts of a process that a simulation can kill.
//!
//! In the product [`spawn`] is `tokio::spawn` and [`blocking`] is `tokio::task::spawn_blocking`. A simulation runs many processes in one: what
//! it starts with [`Process::spawn`], and everything that is spawned from there through this module, ends together at
//! [`Process::kill`], as the tasks of a killed process do. Inside, blocking work is done on the spot, because a thread would bring an order that no seed decides.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::task::{AbortHandle, JoinError, JoinHandle};

tokio::task_local! {
    static PROCESS: Process;
}

/// Handles of ended tasks are swept out when so many are kept.
const SWEEP: usize = 256;

/// A pretended process: a set of tasks that die together.
#[derive(Clone, Debug, Default)]
pub struct Process {
    inner: Arc<Mutex<Tasks>>,
}

#[derive(Debug, Default)]
struct Tasks {
    dead: bool,
    handles: Vec<AbortHandle>,
    sweep_at: usize,
}

impl Process {
    /// A process without tasks.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Starts a task of this process. In a dead process it ends before it begins.
    pub fn spawn<F>(&self, future: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        let task = tokio::spawn(PROCESS.scope(self.clone(), future));
        let mut tasks = self.lock();
        if tasks.dead {
            task.abort();
            return task;
        }
        tasks.handles.push(task.abort_handle());
        if tasks.handles.len() > tasks.sweep_at.max(SWEEP) {
            tasks.handles.retain(|handle| !handle.is_finished());
            tasks.sweep_at = tasks.handles.len() * 2;
        }
        task
    }

    /// Ends every task where it waits now; none of them gets another turn.
    pub fn kill(&self) {
        let handles = {
            let mut tasks = self.lock();
            tasks.dead = true;
            std::mem::take(&mut tasks.handles)
        };
        for handle in handles {
            handle.abort();
        }
    }

    /// Whether it was killed.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.lock().dead
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Tasks> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn current() -> Option<Process> {
    PROCESS.try_with(Clone::clone).ok()
}

/// Starts a task that belongs to the process of the caller.
pub fn spawn<F>(future: F) -> JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    match current() {
        Some(process) => process.spawn(future),
        None => tokio::spawn(future),
    }
}

/// For futures that are spawned by other means, such as a `JoinSet`: what they spawn belongs to the process of the caller.
pub async fn inherit<F: Future>(process: Option<Process>, future: F) -> F::Output {
    match process {
        Some(process) => PROCESS.scope(process, future).await,
        None => future.await,
    }
}

/// The process that the caller belongs to, for [`inherit`]; none in the product.
#[must_use]
pub fn process() -> Option<Process> {
    current()
}

/// Does work that blocks a thread.
///
/// # Errors
/// The work panicked, or the runtime is going down.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, JoinError> {
    if current().is_some() {
        return Ok(work());
    }
    tokio::task::spawn_blocking(work).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test(start_paused = true)]
    async fn tasks_and_their_children_die_together() {
        let process = Process::new();
        let (sender, mut receiver) = tokio::sync::mpsc::unbounded_channel();
        let parent = sender.clone();
        process.spawn(async move {
            spawn(async move {
                tokio::time::sleep(Duration::from_secs(1)).await;
                let _ = sender.send("child");
                tokio::time::sleep(Duration::from_secs(10)).await;
                let _ = sender.send("child again");
            });
            tokio::time::sleep(Duration::from_secs(10)).await;
            let _ = parent.send("parent");
        });
        tokio::time::sleep(Duration::from_secs(5)).await;
        process.kill();
        assert_eq!(receiver.recv().await, Some("child"));
        assert_eq!(receiver.recv().await, None);
        assert!(process.spawn(async {}).await.unwrap_err().is_cancelled());
    }

    #[tokio::test]
    async fn a_process_needs_no_threads() {
        let here = std::thread::current().id();
        let there = || std::thread::current().id();
        assert_ne!(blocking(there).await.unwrap(), here);
        let inside = Process::new().spawn(async move { blocking(there).await.unwrap() });
        assert_eq!(inside.await.unwrap(), here);
    }
}
