//! Long operations of the emulator that run as jobs (QEMU docs, `qapi/job.json`).

use std::time::Duration;

use serde_json::{Value, json};

use super::qmp::{Qmp, QmpError};

const LOOK_EVERY: Duration = Duration::from_millis(20);
/// While a snapshot is written the emulator's main loop is busy and answers late.
const BUSY_DEADLINE: Duration = Duration::from_secs(120);

/// Starts `command` as a job, waits for its end and dismisses it.
///
/// # Errors
/// [`QmpError::Refused`] with the job's own error, [`QmpError::Timeout`] after `deadline` (the job is cancelled then).
pub async fn run(qmp: &Qmp, command: &str, mut arguments: Value, deadline: Duration) -> Result<(), QmpError> {
    let id = format!("oblak-{command}");
    // Left over from a driver that died: its outcome is of no interest any more.
    let _ = qmp.execute("job-dismiss", json!({"id": id})).await;
    arguments["job-id"] = json!(id);
    qmp.execute_with(command, arguments, None, BUSY_DEADLINE).await?;
    let end = tokio::time::Instant::now() + deadline;
    loop {
        let jobs = qmp.execute_with("query-jobs", Value::Null, None, BUSY_DEADLINE).await?;
        let job = jobs.as_array().and_then(|all| all.iter().find(|j| j["id"] == id.as_str())).cloned();
        let Some(job) = job else { return Err(QmpError::Protocol(format!("the job {id} disappeared"))) };
        if job["status"] == "concluded" {
            let _ = qmp.execute("job-dismiss", json!({"id": id})).await;
            return match job["error"].as_str() {
                Some(error) => Err(QmpError::Refused { class: "GenericError".into(), desc: error.into() }),
                None => Ok(()),
            };
        }
        if tokio::time::Instant::now() >= end {
            let _ = qmp.execute("job-cancel", json!({"id": id})).await;
            return Err(QmpError::Timeout { what: command.into(), after: deadline });
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
