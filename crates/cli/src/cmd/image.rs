//! `image ...`

use std::ops::ControlFlow;
use std::path::Path;

use bytes::Bytes;
use futures_util::Stream;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use oblak_model::{Image, ImageKind, ImagePhase, ImageSource, ImageSpec, Size, Span, Visibility};
use serde_json::json;
use std::io::IsTerminal;
use tokio::io::AsyncReadExt;

use super::{check, each, list, object, patch_spec};
use crate::args::{ImageCommand, ImageCreateArgs};
use crate::error::{CliError, Result};
use crate::out::Out;
use crate::session::Session;
use crate::show::word;
use crate::term;
use crate::wait::{Progress, Step, deleted, took, until};

/// Pause between two looks at an image of another project.
const POLL: std::time::Duration = std::time::Duration::from_secs(1);
/// Bytes read from the file at once.
const CHUNK: usize = 256 * 1024;

/// `image ...`
pub async fn run(session: &Session, command: ImageCommand) -> Result<()> {
    match command {
        ImageCommand::List(args) => list::kind::<ImageKind>(session, args.label.as_ref()).await,
        ImageCommand::Get(args) => object::some::<ImageKind>(session, &args.names).await,
        ImageCommand::Create(args) => create(session, *args).await,
        ImageCommand::Delete(args) => object::delete_all::<ImageKind>(session, &args.names, args.wait).await,
        ImageCommand::Wait(args) => {
            each(session, &args.names, |name| async move { wanted(session, &name, args.timeout).await }).await
        }
        ImageCommand::Retry(args) => {
            each(session, &args.names, |name| async move { retry(session, &name, args.timeout).await }).await
        }
    }
}

async fn create(session: &Session, args: ImageCreateArgs) -> Result<()> {
    let password = if args.password_stdin { Some(term::secret("password", true)?) } else { None };
    let source = match (args.from_url, args.from_registry) {
        (Some(url), _) => ImageSource::Url { url },
        (None, Some(reference)) => {
            ImageSource::Registry { reference, insecure: args.insecure, username: args.username, password }
        }
        (None, None) => ImageSource::Upload {},
    };
    let file = match &args.from_file {
        Some(path) => Some((path.clone(), open(path).await?)),
        None => None,
    };
    let spec = ImageSpec {
        source,
        checksum: args.checksum.clone(),
        firmware: args.firmware.into(),
        on_demand: args.on_demand,
        visibility: if args.public { Visibility::Public } else { Visibility::Private },
        min_memory: args.min_memory.unwrap_or(Size::ZERO),
        content: None,
        retry_generation: 0,
    };
    let mut image = Image::new(&args.name, spec);
    image.metadata.labels.extend(args.labels.labels);
    check(&image)?;
    let made = session.client.create::<ImageKind>(&session.project, &image).await?;
    let made = match file {
        None => made,
        Some((path, (file, length))) => {
            let sent = send(session, &made, &path, file, length, args.checksum.as_deref(), args.timeout).await;
            match sent {
                Ok(image) => image,
                Err(error) => {
                    // An image without content helps nobody; the name is free again for the next try.
                    let _ = session.client.delete::<ImageKind>(&session.project, &made.metadata.id.to_string()).await;
                    return Err(error);
                }
            }
        }
    };
    if args.wait {
        let ready = wait(session, &made, args.timeout).await?;
        return session.out.done(&ready, &format!("{} is ready", ready.describe()));
    }
    let next = if made.status.phase == ImagePhase::Ready {
        format!("{} is ready", made.describe())
    } else {
        format!("{} created; `oblak image wait {}` waits until it can be used", made.describe(), made.metadata.name)
    };
    session.out.done(&made, &next)
}

async fn open(path: &Path) -> Result<(tokio::fs::File, u64)> {
    let bad = |e: std::io::Error| CliError::file(path, "read", &e);
    let file = tokio::fs::File::open(path).await.map_err(bad)?;
    let meta = file.metadata().await.map_err(bad)?;
    if !meta.is_file() || meta.len() == 0 {
        let what = if meta.is_file() { "is empty" } else { "is not a file" };
        let hint = "give a disk image, or an OCI layout as one tar file";
        return Err(CliError::usage(format!("{} {what}", path.display()), hint));
    }
    Ok((file, meta.len()))
}

async fn send(
    session: &Session,
    image: &Image,
    path: &Path,
    file: tokio::fs::File,
    length: u64,
    checksum: Option<&str>,
    timeout: Span,
) -> Result<Image> {
    let bar = bar(session.out, length, path);
    let body = content(file, bar.clone());
    let client = session.patient(timeout.0)?;
    let id = image.metadata.id.to_string();
    let sent = client.upload_image(&session.project, &id, checksum, length, body).await;
    bar.finish_and_clear();
    sent.map_err(|error| {
        CliError::from(error)
            .with_hint(format!("check the file and run the same command again: {} was removed", image.describe()))
    })
}

fn bar(out: Out, length: u64, path: &Path) -> ProgressBar {
    let target = if out.quiet || !std::io::stderr().is_terminal() {
        ProgressDrawTarget::hidden()
    } else {
        ProgressDrawTarget::stderr()
    };
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    if target.is_hidden() {
        out.note(&format!("sending {name} ({})", Size(length)));
    }
    let bar = ProgressBar::with_draw_target(Some(length), target);
    let style = ProgressStyle::with_template("{msg} [{wide_bar}] {binary_bytes}/{binary_total_bytes} {eta}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
    bar.set_message(name);
    bar
}

fn content(file: tokio::fs::File, bar: ProgressBar) -> impl Stream<Item = std::io::Result<Bytes>> + Send + 'static {
    futures_util::stream::try_unfold((file, bar), |(mut file, bar)| async move {
        let mut buffer = vec![0u8; CHUNK];
        let n = file.read(&mut buffer).await?;
        if n == 0 {
            return Ok(None);
        }
        buffer.truncate(n);
        bar.inc(n as u64);
        Ok(Some((Bytes::from(buffer), (file, bar))))
    })
}

/// Waits for an image by name; one that waits for its first use does not have to any more.
async fn wanted(session: &Session, name: &str, limit: Span) -> Result<()> {
    let mut image = session.get::<ImageKind>(name).await?;
    if image.metadata.project.as_deref() != Some(session.project.as_str()) {
        let ready = offered(session, image, limit).await?;
        return session.out.done(&ready, &format!("{} is ready ({})", ready.describe(), ready.status.size));
    }
    if image.spec.on_demand && image.status.phase == ImagePhase::Pending {
        image = patch_spec::<ImageKind>(session, name, json!({"on_demand": false})).await?;
    }
    let ready = wait(session, &image, limit).await?;
    session.out.done(&ready, &format!("{} is ready ({})", ready.describe(), ready.status.size))
}

/// Has an image that failed fetched or built once more, and waits for it.
async fn retry(session: &Session, name: &str, limit: Span) -> Result<()> {
    let image = session.get::<ImageKind>(name).await?;
    if image.status.phase != ImagePhase::Failed {
        let state = word(image.status.phase);
        let hint = format!("`oblak image wait {name}` waits until it can be used");
        return Err(CliError::new(format!("image {name} has not failed, it is {state}"), hint));
    }
    if image.metadata.project.as_deref() != Some(session.project.as_str()) {
        let project = image.metadata.project.as_deref().unwrap_or_default();
        let hint = format!("`oblak -p {project} image retry {name}`, with the rights for it");
        return Err(CliError::new(format!("image {name} belongs to project {project}"), hint));
    }
    let spec = json!({"retry_generation": image.spec.retry_generation + 1});
    let image = patch_spec::<ImageKind>(session, name, spec).await?;
    let ready = wait(session, &image, limit).await?;
    session.out.done(&ready, &format!("{} is ready ({})", ready.describe(), ready.status.size))
}

/// Waits for an image that another project offers: it can be read from here, not watched and not asked for.
async fn offered(session: &Session, mut image: Image, limit: Span) -> Result<Image> {
    let deadline = tokio::time::Instant::now() + limit.0;
    loop {
        let name = image.metadata.name.clone();
        if image.spec.on_demand && !image.status.wanted && image.status.phase == ImagePhase::Pending {
            let project = image.metadata.project.as_deref().unwrap_or_default();
            return Err(CliError::new(
                format!("image {name} of project {project} is made when it is first used"),
                format!("`oblak launch {name}` is such a use"),
            ));
        }
        if let ControlFlow::Break(end) = step(&image) {
            return end;
        }
        if tokio::time::Instant::now() >= deadline {
            return Err(crate::wait::late(&format!("getting image {name} ready"), limit));
        }
        tokio::time::sleep(POLL).await;
        image = session.get::<ImageKind>(&image.metadata.id.to_string()).await?;
    }
}

/// Waits until an image can be used.
pub async fn wait(session: &Session, image: &Image, limit: Span) -> Result<Image> {
    let name = image.metadata.name.clone();
    let mut progress = Progress::new(session.out);
    let what = format!("getting image {name} ready");
    let result = until::<ImageKind, Image>(session, image.metadata.id, &what, limit, |now| {
        let Some(now) = now else { return deleted("image", &name) };
        if let ControlFlow::Break(end) = step(now) {
            return ControlFlow::Break(end);
        }
        let percent = if now.status.progress > 0 { format!(" {} %", now.status.progress) } else { String::new() };
        let text = format!("{}{percent}", now.status.message);
        progress.say(&format!("image {name} {}", word(now.status.phase)), text.trim());
        ControlFlow::Continue(())
    })
    .await;
    let time = progress.end();
    if result.is_ok() && time.as_secs() >= 1 {
        session.out.note(&format!("image {name} was ready after {}", took(time)));
    }
    result
}

fn step(now: &Image) -> Step<Image> {
    let name = &now.metadata.name;
    match now.status.phase {
        ImagePhase::Ready => ControlFlow::Break(Ok(now.clone())),
        ImagePhase::Failed => ControlFlow::Break(Err(CliError::new(
            format!("image {name} failed: {}", now.status.message),
            match now.spec.source {
                // Its content is gone with the failure.
                ImageSource::Upload {} => {
                    format!("delete it with `oblak image delete {name}` and create it again from a good file")
                }
                _ => format!("remove the cause, then try again with `oblak image retry {name}`"),
            },
        ))),
        ImagePhase::Pending | ImagePhase::Importing if now.metadata.is_deleting() => deleted("image", name),
        ImagePhase::Pending if matches!(now.spec.source, ImageSource::Upload {}) => {
            ControlFlow::Break(Err(CliError::new(
                format!("image {name} waits for its content"),
                format!("delete it and create it again with `oblak image create {name} --from-file FILE`"),
            )))
        }
        ImagePhase::Pending | ImagePhase::Importing => ControlFlow::Continue(()),
    }
}
