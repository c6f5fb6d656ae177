//! The driver on a real Ceph: the suite that every volume driver passes, and what only a shared pool has to show.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod ceph;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use ceph::{Ceph, POOL};
use oblak_model::{Size, VolumeId};
use oblak_platform::driver::Remedy;
use oblak_volume::conformance::{Harness, suite};
use oblak_volume::{Claim, Format, Source, VolumeDriver, VolumeHandle, VolumeSpec};
use oblak_volume_rbd::{RbdConfig, RbdDriver};

struct Bed {
    ceph: Ceph,
    driver: Mutex<Arc<RbdDriver>>,
}

impl Bed {
    fn driver_of(ceph: &Ceph) -> RbdDriver {
        RbdDriver::new(RbdConfig { conf: ceph.conf(), user: "oblak".into(), pool: POOL.into() })
    }
}

#[async_trait]
impl Harness for Bed {
    fn driver(&self) -> Arc<dyn VolumeDriver> {
        self.driver.lock().unwrap().clone()
    }
    async fn restart(&self) {
        *self.driver.lock().unwrap() = Arc::new(Self::driver_of(&self.ceph));
    }
    async fn write(&self, handle: &VolumeHandle, text: &str) {
        let mut bytes = text.as_bytes().to_vec();
        bytes.resize(512, 0);
        let from = self.ceph.path("sector");
        std::fs::write(&from, bytes).unwrap();
        let order = format!("write -q -s {} 0 512", from.display());
        tool("qemu-io", &["-f", "raw", "-c", &order, handle.path.to_str().unwrap()]);
    }
    async fn read(&self, handle: &VolumeHandle) -> String {
        read(&self.ceph, handle)
    }
    async fn leaks(&self) -> Vec<String> {
        let objects = self.ceph.run("rados", &["-p", POOL, "ls"]);
        // What RBD keeps in every pool.
        let own = ["rbd_directory", "rbd_info", "rbd_trash", "rbd_children", "rbd_task"];
        objects.lines().filter(|o| !own.contains(o)).map(str::to_string).collect()
    }
    fn formats(&self) -> Vec<Format> {
        vec![Format::Raw]
    }
    fn cancellations(&self) -> usize {
        4
    }
}

fn read(ceph: &Ceph, handle: &VolumeHandle) -> String {
    let to = ceph.path("read");
    let (from, to) = (format!("if={}", handle.path.display()), to.display().to_string());
    tool("qemu-img", &["dd", "-f", "raw", "-O", "raw", "bs=512", "count=1", &from, &format!("of={to}")]);
    String::from_utf8(std::fs::read(to).unwrap()).unwrap().trim_end_matches('\0').into()
}

fn tool(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_ceph() {
    if let Some(reason) = ceph::missing() {
        println!("skipped: {reason}");
        return;
    }
    let ceph = Ceph::start();
    ceph.user("oblak");
    let driver = Mutex::new(Arc::new(Bed::driver_of(&ceph)));
    let mut bed = Bed { ceph, driver };
    suite(&bed).await;
    println!("images_become_volumes");
    images_become_volumes(&bed).await;
    println!("an_older_epoch_cannot_write");
    an_older_epoch_cannot_write(&bed).await;
    println!("wrong_names_are_said");
    wrong_names_are_said(&bed).await;
    the_loss_of_an_osd_is_survived(&mut bed).await;
    assert_eq!(bed.leaks().await, Vec::<String>::new());
}

fn spec() -> VolumeSpec {
    let id = VolumeId(uuid::Uuid::now_v7());
    VolumeSpec { id, size: Size::mib(8), format: Format::Raw, source: Source::Empty, dir: None, owner: (0, 0) }
}

/// A root disk: content of an image, size of its own.
async fn images_become_volumes(bed: &Bed) {
    let path = bed.ceph.path("image.raw");
    let mut bytes = b"an image".to_vec();
    bytes.resize(1 << 20, 0);
    std::fs::write(&path, bytes).unwrap();
    let driver = bed.driver();
    let spec = VolumeSpec { source: Source::Image { path, format: Format::Raw }, ..spec() };
    let handle = driver.ensure(&spec, false).await.unwrap();
    assert_eq!((read(&bed.ceph, &handle).as_str(), handle.size), ("an image", Size::mib(8)));
    driver.remove(spec.id).await.unwrap();
}

/// A process that has the image open and writes when told to, as the emulator of a guest does.
struct Guest {
    child: Child,
    orders: ChildStdin,
    answers: Receiver<String>,
}

impl Guest {
    fn open(handle: &VolumeHandle) -> Self {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "stdbuf", "-o0", "qemu-io", "-f", "raw"]).arg(&handle.path);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = command.spawn().unwrap();
        let (orders, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (send, answers) = channel();
        std::thread::spawn(move || {
            BufReader::new(output)
                .lines()
                .map_while(Result::ok)
                .take_while(|l| send.send(l.clone()).is_ok())
                .for_each(drop);
        });
        Self { child, orders, answers }
    }

    /// Writes a pattern at the start and forces it to the OSDs; whether they took it. Who is shut out may be told so or hear nothing.
    fn write(&mut self, pattern: u8) -> bool {
        // `-f` ends when the OSDs have it.
        writeln!(self.orders, "write -f -P {pattern} 0 512").unwrap();
        while let Ok(line) = self.answers.recv_timeout(Duration::from_secs(20)) {
            if line.contains("failed") || line.contains("rror") {
                return false;
            }
            if line.contains("wrote 512/512") {
                return true;
            }
        }
        false
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The fence: who has the image open with an older epoch writes nothing any more, although nobody asked it to stop.
async fn an_older_epoch_cannot_write(bed: &Bed) {
    let driver = bed.driver();
    let spec = spec();
    let handle = driver.ensure(&spec, false).await.unwrap();
    let claim = |node: &str, epoch| Claim { instance: "db".into(), node: node.into(), epoch };
    driver.claim(spec.id, &claim("n1", 1)).await.unwrap();
    let mut old = Guest::open(&handle);
    assert!(old.write(0x41), "who holds the epoch writes");
    driver.claim(spec.id, &claim("n1", 1)).await.unwrap();
    assert!(old.write(0x42), "claiming the same again shuts nobody out");

    driver.claim(spec.id, &claim("n2", 2)).await.unwrap();
    let mut new = Guest::open(&handle);
    assert!(new.write(0x43));
    assert!(!old.write(0x44), "the old one must not get through");
    drop(new);
    assert_eq!(read(&bed.ceph, &handle).as_bytes()[0], 0x43, "nothing of the old one arrived");

    let refused = async |claim: Claim| driver.claim(spec.id, &claim).await.unwrap_err();
    for late in [claim("n1", 1), claim("n1", 2)] {
        let error = refused(late).await;
        assert_eq!((error.remedy, error.code.as_str()), (Remedy::Permanent, "stale_epoch"), "{error}");
        assert!(error.detail.contains("node n2"), "{error}");
    }
    drop(old);
    driver.remove(spec.id).await.unwrap();
    assert_eq!(refused(claim("n2", 2)).await.remedy, Remedy::Gone);
}

/// Wrong settings are named, not waited for.
async fn wrong_names_are_said(bed: &Bed) {
    let with = |user: &str, pool: &str| {
        RbdDriver::new(RbdConfig { conf: bed.ceph.conf(), user: user.into(), pool: pool.into() })
    };
    let probed = with("admin", "nope").probe().await;
    assert!(!probed.available && probed.probed[0].detail.contains("no pool nope"), "{probed:?}");
    let probed = with("nobody", POOL).probe().await;
    assert!(!probed.available && !probed.probed[0].detail.is_empty(), "{probed:?}");
    let good = with("oblak", POOL).probe().await;
    assert!(good.available && good.free.0 > 0, "{good:?}");
}

/// One OSD of three is lost: everything goes on.
async fn the_loss_of_an_osd_is_survived(bed: &mut Bed) {
    let spec = spec();
    let handle = bed.driver().ensure(&spec, false).await.unwrap();
    bed.write(&handle, "before").await;
    bed.ceph.kill("osd.2");
    assert_eq!(read(&bed.ceph, &handle), "before");
    bed.write(&handle, "after").await;
    assert_eq!(read(&bed.ceph, &handle), "after");
    bed.driver().remove(spec.id).await.unwrap();
}
