//! What goes wrong, when the dice say so, and that it is mended again.

use std::time::Duration;

use oblak_model::Size;

use crate::chance::Dice;
use crate::cloud::Cloud;
use crate::drivers::Day;
use crate::net::{Cut, Weather};
use crate::store::Mood;

/// Room for volumes on a machine's disk when nothing is wrong with it.
const ROOM: Size = Size::gib(100);

/// When something broken is to be mended.
enum Mend {
    Server(usize),
    Pause(usize),
    Agent(usize),
    Link(String),
    Day(usize),
    Store,
    Disk(usize),
}

/// Breaks and mends until dropped.
pub async fn run(cloud: &Cloud) {
    let mut dice = Dice::new(cloud.settings.seed, "chaos");
    let mut mends: Vec<(tokio::time::Instant, Mend)> = Vec::new();
    loop {
        let next = tokio::time::Instant::now() + dice.between(Duration::from_secs(1), Duration::from_secs(40));
        loop {
            mends.sort_by_key(|(at, _)| *at);
            let Some((at, _)) = mends.first().filter(|(at, _)| *at <= next) else { break };
            tokio::time::sleep_until(*at).await;
            let (_, mend) = mends.remove(0);
            self::mend(cloud, mend);
        }
        tokio::time::sleep_until(next).await;
        let within = dice.between(Duration::from_millis(100), Duration::from_secs(50));
        if let Some(mend) = strike(cloud, &mut dice).await {
            mends.push((next + within, mend));
        }
    }
}

fn mend(cloud: &Cloud, mend: Mend) {
    match mend {
        Mend::Server(n) => cloud.servers[n].start(),
        Mend::Pause(n) => {
            cloud.trace.note("chaos", format_args!("server {} goes on", cloud.servers[n].name()));
            cloud.servers[n].pause.end();
        }
        Mend::Agent(n) => start(cloud, n),
        Mend::Link(who) => {
            cloud.trace.note("chaos", format_args!("the link of {who} is mended"));
            cloud.net.cut(&who, Cut::default());
        }
        Mend::Day(n) => cloud.machines[n].days.set(Day::default()),
        Mend::Store => {
            cloud.trace.note("chaos", "the disk of the store has room again");
            cloud.moods.fill(false);
        }
        Mend::Disk(n) => {
            cloud.trace.note("chaos", format_args!("the disk of {} has room again", cloud.machines[n].name));
            cloud.machines[n].volumes.set_capacity(ROOM);
        }
    }
}

fn start(cloud: &Cloud, n: usize) {
    if let Err(error) = cloud.start_agent(n) {
        cloud.trace.violation(format_args!("an agent does not start: {error}"));
    }
}

async fn strike(cloud: &Cloud, dice: &mut Dice) -> Option<Mend> {
    let n = dice.below(cloud.machines.len());
    let machine = cloud.machines.get(n)?;
    match dice.below(110) {
        0..=14 => {
            machine.kill(&cloud.trace);
            Some(Mend::Agent(n))
        }
        15..=21 => {
            let n = dice.below(cloud.servers.len());
            cloud.servers[n].kill();
            Some(Mend::Server(n))
        }
        22..=26 => {
            let n = dice.below(cloud.servers.len());
            cloud.trace.note("chaos", format_args!("server {} is paused", cloud.servers[n].name()));
            cloud.servers[n].pause.begin();
            Some(Mend::Pause(n))
        }
        27..=44 => {
            let cut = *dice.choose(&[
                Cut { up: true, down: true },
                Cut { up: true, down: false },
                Cut { up: false, down: true },
            ])?;
            cloud.trace.note("chaos", format_args!("the link of {} is cut: {cut:?}", machine.name));
            cloud.net.cut(&machine.name, cut);
            Some(Mend::Link(machine.name.clone()))
        }
        45..=60 => {
            weather(cloud, dice);
            None
        }
        61..=72 => {
            mood(cloud, dice);
            None
        }
        73..=78 => {
            cloud.compact().await;
            None
        }
        79..=84 => {
            let all: Vec<_> = machine.guests.running().into_iter().collect();
            let guest = *dice.choose(&all)?;
            cloud.trace.note("chaos", format_args!("guest {guest} is lost"));
            if dice.permille(500) {
                machine.guests.lose(guest);
            } else {
                machine.guests.exit(guest, 1);
            }
            None
        }
        85..=94 => {
            let hangs = if dice.permille(300) { 200 } else { 0 };
            let day = Day { fails: 300, delay: dice.between(Duration::ZERO, Duration::from_secs(30)), hangs };
            cloud.trace.note("chaos", format_args!("{} has a bad day: {day:?}", machine.name));
            machine.days.set(day);
            Some(Mend::Day(n))
        }
        95..=98 => {
            cloud.trace.note("chaos", "the disk of the store is full");
            cloud.moods.fill(true);
            Some(Mend::Store)
        }
        99..=103 => {
            cloud.trace.note("chaos", format_args!("the disk of {} is full", machine.name));
            machine.volumes.set_capacity(Size::ZERO);
            Some(Mend::Disk(n))
        }
        _ => {
            machine.reboot(&cloud.trace);
            Some(Mend::Agent(n))
        }
    }
}

fn weather(cloud: &Cloud, dice: &mut Dice) {
    let mut bad = |most: usize| if dice.permille(400) { 0 } else { u32::try_from(dice.below(most)).unwrap_or(0) };
    let (lost_requests, lost_answers, doubled) = (bad(80), bad(80), bad(60));
    let delay = dice.between(Duration::ZERO, Duration::from_secs(4));
    let weather = Weather { lost_requests, lost_answers, doubled, delay };
    cloud.trace.note("chaos", format_args!("{weather:?}"));
    cloud.net.set_weather(weather);
}

fn mood(cloud: &Cloud, dice: &mut Dice) {
    let mut bad = |most: usize| if dice.permille(500) { 0 } else { u32::try_from(dice.below(most)).unwrap_or(0) };
    let (lost_requests, lost_replies) = (bad(60), bad(60));
    let delay = dice.between(Duration::ZERO, Duration::from_millis(500));
    let mood = Mood { lost_requests, lost_replies, delay, ..Mood::default() };
    cloud.trace.note("chaos", format_args!("{mood:?}"));
    cloud.moods.set(mood);
}

/// Mends everything, and nothing new goes wrong.
pub fn heal(cloud: &Cloud) {
    cloud.trace.note("chaos", "everything is mended");
    cloud.net.heal();
    cloud.moods.set(Mood::default());
    for (n, machine) in cloud.machines.iter().enumerate() {
        machine.days.set(Day::default());
        machine.volumes.set_capacity(ROOM);
        start(cloud, n);
    }
    for server in &cloud.servers {
        server.pause.end();
        server.start();
    }
}
