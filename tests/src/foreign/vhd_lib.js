// Chains of VHDs in folders by Xen Orchestra's own library: `write` makes them of raw images, `read` makes raw images of them.
'use strict'
const fs = require('fs/promises')
const { dirname, join } = require('path')
const { Disposable } = require('promise-toolbox')
const { VhdAbstract } = require('vhd-lib/Vhd/VhdAbstract')
const { VhdDirectory } = require('vhd-lib/Vhd/VhdDirectory')
const { VhdSynthetic } = require('vhd-lib/Vhd/VhdSynthetic')
const { unpackFooter, unpackHeader } = require('vhd-lib/Vhd/_utils')
const { createFooter, createHeader } = require('vhd-lib/_createFooterHeader')

const [, , verb, root, ...words] = process.argv
const BLOCK = 2 << 20
const at = path => join(root, path)
const handler = {
  closeFile: file => file.close(),
  getSize: async path => (await (typeof path === 'string' ? fs.stat(at(path)) : path.stat())).size,
  mktree: path => fs.mkdir(at(path), { recursive: true }),
  openFile: async path => {
    const file = await fs.open(at(path), 'r')
    if ((await file.stat()).isDirectory()) {
      await file.close()
      throw Object.assign(new Error('a folder'), { code: 'EISDIR' })
    }
    return file
  },
  outputFile: async (path, bytes) => {
    await fs.mkdir(dirname(at(path)), { recursive: true })
    await fs.writeFile(at(path), bytes)
  },
  read: (file, buffer, position) => file.read(buffer, 0, buffer.length, position),
  readFile: path => fs.readFile(at(path)),
  writeFile: (path, bytes) => fs.writeFile(at(path), bytes),
}

// words: compression, then an alias and a raw image for each point, oldest first
async function write([compression, ...points]) {
  let parent
  for (let n = 0; n < points.length; n += 2) {
    const [alias, raw] = [points[n], await fs.readFile(points[n + 1])]
    const target = join(dirname(alias), 'data', `${n}.vhd`)
    const { value: vhd } = await VhdDirectory.create(handler, target, { compression })
    const blocks = Math.ceil(raw.length / BLOCK)
    vhd.footer = unpackFooter(createFooter(raw.length, 0, undefined, 512, parent === undefined ? 3 : 4))
    // A valid one: version and variant are checked.
    vhd.footer.uuid = Buffer.from(Buffer.alloc(16, n + 1)).fill(0x40, 6, 7).fill(0x80, 8, 9)
    const header = unpackHeader(createHeader(blocks, undefined, BLOCK), vhd.footer)
    if (parent !== undefined) {
      header.parentUuid = parent.uuid
      header.parentUnicodeName = parent.name
    }
    vhd.header = header
    for (let id = 0; id < blocks; id++) {
      const part = bytes => {
        const block = Buffer.alloc(BLOCK)
        bytes?.copy(block, 0, id * BLOCK, Math.min(bytes.length, (id + 1) * BLOCK))
        return block
      }
      const data = part(raw)
      if (!data.equals(part(parent?.raw))) {
        const bitmap = Buffer.alloc(vhd.bitmapSize, 0xff)
        await vhd.writeEntireBlock({ id, bitmap, data, buffer: Buffer.concat([bitmap, data]) })
      }
    }
    await vhd.writeFooter()
    await vhd.writeHeader()
    await vhd.writeBlockAllocationTable()
    await VhdAbstract.createAlias(handler, alias, target)
    parent = { name: alias.split('/').pop(), raw, uuid: vhd.footer.uuid }
  }
}

// words: an alias, and where the raw image goes
async function read([alias, to]) {
  await Disposable.use(VhdSynthetic.fromVhdChain(handler, alias), async vhd => {
    await vhd.readBlockAllocationTable()
    const out = await fs.open(to, 'w')
    const size = vhd.footer.currentSize
    await out.truncate(size)
    for (let id = 0; id * BLOCK < size; id++) {
      if (vhd.containsBlock(id)) {
        const { data } = await vhd.readBlock(id)
        await out.write(data, 0, Math.min(BLOCK, size - id * BLOCK), id * BLOCK)
      }
    }
    await out.close()
  })
}

;({ read, write })[verb](words).catch(error => {
  console.error(error)
  process.exit(1)
})
