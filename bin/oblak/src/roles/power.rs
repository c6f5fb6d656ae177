//! Settings of high availability, and a person's command that powers nodes off.

use std::future::Future;
use std::pin::Pin;
use std::process::Stdio;
use std::sync::Arc;

use oblak_control::ha::{HaConfig, Power};

use crate::args::HaArgs;

/// Longest part of what the command says that is repeated.
const SAID: usize = 500;

/// What the reconciler is given.
pub fn settings(args: &HaArgs) -> HaConfig {
    let power = args.power_off.clone().map(|program| Arc::new(Command(program)) as Arc<dyn Power>);
    HaConfig { brake_percent: args.evacuation_brake, power, ..HaConfig::default() }
}

/// Runs a program with the name of the node as its only argument.
struct Command(std::path::PathBuf);

impl Power for Command {
    fn off(&self, node: &str) -> Pin<Box<dyn Future<Output = Result<(), String>> + Send>> {
        let mut command = tokio::process::Command::new(&self.0);
        // Given up with the future, so nothing hangs on for ever.
        command.arg(node).stdin(Stdio::null()).kill_on_drop(true);
        let name = self.0.display().to_string();
        Box::pin(async move {
            let out = command.output().await.map_err(|e| format!("cannot run {name}: {e}"))?;
            if out.status.success() {
                return Ok(());
            }
            let said = String::from_utf8_lossy(&out.stderr).trim().chars().take(SAID).collect::<String>();
            Err(format!("{name} ended with {}: {said}", out.status))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_command_is_believed_by_its_status() {
        assert_eq!(Command("/bin/true".into()).off("n1").await, Ok(()));
        assert!(Command("/bin/false".into()).off("n1").await.unwrap_err().contains("ended with"));
        assert!(Command("/nowhere/to-be-found".into()).off("n1").await.unwrap_err().contains("cannot run"));
    }
}
