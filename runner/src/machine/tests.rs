//! Both forms say the same machine; what is wrong is refused with its place.

use super::*;

const DOMAIN: &str = r#"<?xml version="1.0"?>
<!-- dumped -->
<domain type='kvm' id='3' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>db01</name>
  <uuid>1b4e28ba-2fa1-11d2-883f-0016d3cca427</uuid>
  <memory unit='KiB'>4194304</memory>
  <vcpu placement='static' current='1'>2</vcpu>
  <os firmware='efi'><type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'>/var/lib/libvirt/qemu/nvram/db01_VARS.fd</nvram></os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='/var/lib/libvirt/images/db01.qcow2'/>
      <target dev='vda' bus='virtio'/>
      <boot order='1'/>
    </disk>
    <disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk>
    <disk type='block' device='disk'><source dev='/dev/vg0/data'/><target dev='sdb' bus='scsi'/></disk>
    <interface type='network'>
      <mac address='52:54:00:AB:CD:EF'/><source network='default'/><model type='virtio'/>
    </interface>
  </devices>
</domain>"#;

const PLAIN: &str = r#"
version = 1
name = "db01"
uuid = "1b4e28ba-2fa1-11d2-883f-0016d3cca427"
firmware = "uefi"
machine_type = "pc-q35-7.2"
nvram = "/var/lib/libvirt/qemu/nvram/db01_VARS.fd"
cpus = 2
memory = "4GiB"
[[disk]]
name = "vda"
bus = "virtio"
source = "/var/lib/libvirt/images/db01.qcow2"
boot_order = 1
[[disk]]
name = "sdb"
bus = "scsi"
source = "/dev/vg0/data"
[[nic]]
mac = "52-54-00-ab-cd-ef"
model = "virtio"
network = "default"
"#;

#[test]
fn both_forms_say_the_same() {
    let domain = Described::parse("d.xml", DOMAIN).expect("xml");
    let plain = Described::parse("d.toml", PLAIN).expect("toml");
    assert_eq!(domain, plain);
    assert_eq!(domain.memory, Some(4 << 30));
    assert_eq!(domain.disks.len(), 2);
    assert_eq!(domain.nics[0].mac.as_deref(), Some("52:54:00:ab:cd:ef"));
}

#[test]
fn the_documented_sample_is_read() {
    let sample: String = include_str!("plain.rs")
        .lines()
        .skip_while(|l| *l != "//! ```toml")
        .skip(1)
        .take_while(|l| *l != "//! ```")
        .map(|l| format!("{}\n", l.trim_start_matches("//! ")))
        .collect();
    assert_eq!(Described::parse("sample", &sample).expect("valid").name.as_deref(), Some("db01"));
}

#[test]
fn what_is_wrong_is_refused_with_its_place() {
    let wrong = |text: &str| Described::parse("m", text).expect_err(text).what;
    let escape = "<domain><devices><disk><target dev='../x'/></disk></devices></domain>";
    assert!(wrong(escape).contains("`../x` is not 1 to 64"), "{}", wrong(escape));
    assert!(wrong("<domain><name>x</domain>").starts_with("m:1:"), "{}", wrong("<domain><name>x</domain>"));
    assert!(wrong("<network/>").contains("is not a libvirt <domain>"));
    assert!(wrong("<domain>\n <uuid>x</uuid></domain>").starts_with("m:2:2: `x` is not a UUID"));
    assert!(wrong("<domain><memory unit='parsec'>1</memory></domain>").contains("memory"));
    assert!(wrong("<domain><memory unit='TiB'>99999999999999</memory></domain>").contains("memory"));
    assert!(wrong("<domain><vcpu>0</vcpu></domain>").contains("processors"));
    let bomb = "<!DOCTYPE d [<!ENTITY a \"aaaa\"><!ENTITY b \"&a;&a;\">]><domain><name>&b;</name></domain>";
    assert!(wrong(bomb).contains("DTD"), "{}", wrong(bomb));
    let twice = "<domain><devices><disk><target dev='vda'/></disk><disk><target dev='vda'/></disk></devices></domain>";
    assert!(wrong(twice).contains("two disks are called `vda`"));
    assert!(wrong("name = \"../x\"").contains("m:1:8:"), "{}", wrong("name = \"../x\""));
    assert!(wrong("firmware = \"uboot\"").contains("neither bios nor uefi"));
    assert!(wrong("memory = 4096").contains("must be a string"));
    assert!(wrong("[[disk]]\nbus = \"virtio\"\n").contains("a disk without a `name`"));
    assert!(wrong("[[disk]]\nname = \"a\"\n[[disk]]\nname = \"a\"\n").contains("two disks are called `a`"));
    assert!(wrong("cpu = 2").contains("did you mean `cpus`?"));
}
