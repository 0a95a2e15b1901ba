/* Fuzzes the way of a datagram off the wire: who may send what to whom (law 5), GRO, ECN, coalescing, and a device that
 * refuses. A target for libFuzzer.
 *
 * The kernel is played here: its recvmmsg hands out the datagrams of the input, and what is written to the device is
 * compared with an oracle that looks each packet up in a plain list of the peers.
 *
 * An input begins with one byte of what there is and one of what the device refuses; own subnets as two times two bytes; and
 * three peers of five bytes, see read_table. Then come datagrams, each behind one byte of flags, two of length, and two of
 * the size that UDP_GRO tells. The last may be longer than what is left of the input: the rest is zeros.
 */
#define _GNU_SOURCE
#include <sys/socket.h>

struct mmsghdr;
static int play_recvmmsg(int descriptor, struct mmsghdr *messages, unsigned most, int flags, struct timespec *timeout);
#define recvmmsg play_recvmmsg
#include "receive.c" /* NOLINT: for its system call */
#undef recvmmsg

#include "oracle.h"

enum { SERVES4 = 1, SERVES6 = 2, TCP = 4, UDP = 8, BATCHING = 16 };
enum { REFUSES_RUNS = 1, HAS_NO_ROOM = 2, REFUSES_ALL = 4 };
enum { COMPLETE = 1, OUTER_ECN = 6, SENDER6 = 8, SENDER = 48, WITH_GRO = 64, LATER = 128 };
enum { PEERS = 3, MOST = 200, WIRE = 7 };

static const uint8_t *input;
static size_t left;
static unsigned datagrams, refusals;
static void *memory[MOST];
static struct worker worker;
static struct subnet own[2];
static struct peer_entry peers[PEERS];
static bool serves[2];
static uint64_t wanted_drops[DROPS], wanted_packets[PEERS], wanted_bytes[PEERS], lost;

/* ---- The oracle: law 5, as it is written. */

static bool lies_in(const struct subnet *subnet, const uint8_t *address)
{
    if (subnet->length == NO_SUBNET)
        return false;
    for (unsigned bit = 0; bit < subnet->length; bit++)
        if (((subnet->address[bit / 8] ^ address[bit / 8]) >> (7 - bit % 8)) & 1)
            return false;
    return true;
}

static const struct subnet *subnet_of(const struct peer_entry *peer, bool v6)
{
    return v6 ? &peer->subnet6 : &peer->subnet4;
}

/* A peer counts if it can be reached, and has a subnet of a version that this node has one of, too. */
static bool counts(const struct peer_entry *peer)
{
    bool shared = false;
    for (unsigned v6 = 0; v6 < 2; v6++)
        shared |= own[v6].length != NO_SUBNET && subnet_of(peer, v6)->length != NO_SUBNET;
    return shared && serves[peer->version == 6];
}

/* Marks a packet as the outer header was marked: RFC 6040, figure 4. False if it must be dropped. */
static bool mark(uint8_t *data, unsigned outer)
{
    enum { DROPPED = 4 };
    static const unsigned marks[4][4] = {{0, 0, 0, DROPPED}, {1, 1, 1, 3}, {2, 1, 2, 3}, {3, 3, 3, 3}};
    bool v4 = data[0] >> 4 == 4;
    unsigned inner = v4 ? data[1] & 3 : data[1] >> 4 & 3, marked = marks[inner][outer];
    if (marked == DROPPED)
        return false;
    if (marked != inner) {
        bool right = oracle_ip_is_right(data);
        data[1] = (uint8_t)(v4 ? (data[1] & ~3u) | marked : (data[1] & ~0x30u) | marked << 4);
        if (v4 && right) {
            data[10] = data[11] = 0;
            oracle_write16(data + 10, ~oracle_sum(0, data, oracle_ip_length(data)));
        } else if (v4) {
            /* A wrong checksum stays as wrong as it was: by as much as the word has changed. */
            oracle_write16(data + 10, ~oracle_sum((oracle16(data + 10) ^ 0xFFFF) + marked + 0xFFFF - inner, NULL, 0));
        }
    }
    return true;
}

/* What must become of a packet that came in a datagram from `sender`; `data` is the oracle's own copy. */
static enum drop judge(uint8_t *data, size_t size, bool sender6, const uint8_t *sender, unsigned ecn, unsigned *holder)
{
    bool v6 = size > 0 && data[0] >> 4 == 6, known = false;
    for (unsigned i = 0; i < PEERS; i++)
        known |= counts(&peers[i]) && (peers[i].version == 6) == sender6 && memcmp(peers[i].address, sender, sender6 ? 16 : 4) == 0;
    if (!known)
        return DROP_UNKNOWN_PEER;
    if (size < 20 || (data[0] >> 4 != 4 && !v6) || (v6 && (size < 40 || oracle16(data + 4) + 40 != size)) ||
        (!v6 && ((data[0] & 15) < 5 || (data[0] & 15) * 4u > size || oracle16(data + 2) != size)))
        return DROP_MALFORMED;
    if (own[v6].length == NO_SUBNET)
        return DROP_UNSUPPORTED;
    const uint8_t *source = oracle_addresses(data), *destination = source + (v6 ? 16 : 4);
    int longest = -1;
    for (unsigned i = 0; i < PEERS; i++) {
        const struct subnet *subnet = subnet_of(&peers[i], v6);
        if (counts(&peers[i]) && (peers[i].version == 6) == sender6 &&
            memcmp(peers[i].address, sender, sender6 ? 16 : 4) == 0 && lies_in(subnet, source) && subnet->length > longest) {
            longest = subnet->length;
            *holder = i;
        }
    }
    if (longest < 0)
        return DROP_SPOOFED_SOURCE;
    if (!lies_in(&own[v6], destination))
        return DROP_FOREIGN_DESTINATION;
    return mark(data, ecn) ? DROP_NONE : DROP_CONGESTION;
}

/* ---- The kernel. */

static unsigned next16(void)
{
    unsigned value = oracle16(input);
    input += 2;
    left -= 2;
    return value;
}

static size_t add_control(struct msghdr *header, size_t used, int level, int type, const void *value, size_t size)
{
    struct cmsghdr *control = (struct cmsghdr *)((uint8_t *)header->msg_control + used);
    CHECK(used + CMSG_SPACE(size) <= header->msg_controllen);
    control->cmsg_level = level;
    control->cmsg_type = type;
    control->cmsg_len = CMSG_LEN(size);
    memcpy(CMSG_DATA(control), value, size);
    return used + CMSG_SPACE(size);
}

static int play_recvmmsg(int descriptor, struct mmsghdr *messages, unsigned most, int flags, struct timespec *timeout)
{
    CHECK(descriptor == WIRE && most > 0 && (flags & MSG_DONTWAIT) && timeout == NULL);
    unsigned got = 0;
    while (got < most && left >= 5 && datagrams < MOST) {
        unsigned kind = *input++, size, ecn = (kind & OUTER_ECN) >> 1;
        left--;
        if ((kind & LATER) && got > 0) { /* its time has not come yet */
            input--;
            left++;
            return (int)got;
        }
        if (kind & LATER)
            worker.now += 2 * RETRY;
        size = next16();
        int segment = (int16_t)next16();
        size_t each = (kind & WITH_GRO) && segment > 0 && (size_t)segment < size ? (size_t)segment : size, at = 0;
        if (expected_count + size / (each ? each : 1) + 1 > MOST_EXPECTED) {
            left = 0;
            break;
        }
        size_t given = size < left ? size : left;
        uint8_t *data = memory[datagrams++] = malloc(size ? size : 1);
        memcpy(data, input, given);
        memset(data + given, 0, size - given);
        input += given;
        left -= given;

        struct msghdr *header = &messages[got].msg_hdr;
        uint8_t sender[16] = {0};
        bool sender6 = kind & SENDER6;
        size_t used = 0;
        if (sender6) {
            struct sockaddr_in6 name = {.sin6_family = AF_INET6, .sin6_port = 53};
            memcpy(sender, (uint8_t[]){0xFD, 0xFF}, 2);
            sender[15] = (uint8_t)((kind & SENDER) >> 4);
            memcpy(&name.sin6_addr, sender, 16);
            memcpy(header->msg_name, &name, sizeof name);
        } else {
            struct sockaddr_in name = {.sin_family = AF_INET, .sin_port = 53};
            memcpy(sender, (uint8_t[]){172, 16, 130, (uint8_t)((kind & SENDER) >> 4)}, 4);
            memcpy(&name.sin_addr, sender, 4);
            memcpy(header->msg_name, &name, sizeof name);
        }
        if (kind & WITH_GRO)
            used = add_control(header, used, IPPROTO_UDP, UDP_GRO, &segment, sizeof segment);
        if (sender6) {
            int class = (int)ecn | 0xB8;
            used = add_control(header, used, IPPROTO_IPV6, IPV6_TCLASS, &class, sizeof class);
        } else {
            uint8_t service = (uint8_t)(ecn | 0xB8);
            used = add_control(header, used, IPPROTO_IP, IP_TOS, &service, sizeof service);
        }
        header->msg_controllen = used;
        header->msg_iov->iov_base = data;
        messages[got++].msg_len = size;

        /* Each packet of the run by itself. */
        do {
            size_t length = size - at < each ? size - at : each;
            unsigned holder = 0;
            if (kind & COMPLETE)
                oracle_complete(data + at, length, false);
            uint8_t *copy = malloc(length ? length : 1);
            memcpy(copy, data + at, length);
            enum drop verdict = judge(copy, length, sender6, sender, ecn, &holder);
            if (verdict == DROP_NONE) {
                expected[expected_count++] = (struct expected){copy, length, holder, false};
            } else {
                wanted_drops[verdict]++;
                free(copy);
            }
            at += each;
        } while (at < size);
    }
    errno = EAGAIN;
    return got > 0 ? (int)got : -1;
}

static void came_out(struct expected *each)
{
    wanted_packets[each->owner]++;
    wanted_bytes[each->owner] += each->size;
}

static void vanished(struct expected *each)
{
    (void)each;
    lost++;
}

int worker_write(struct worker *writer, const struct offload_header *offload, struct iovec *pieces, int count)
{
    static uint8_t whole[LARGEST_PACKET];
    size_t size = 0;
    CHECK(writer == &worker && offload->type != OFFLOAD_NONE && count > 2);
    CHECK(!offload_is_off(writer, offload->type == OFFLOAD_UDP ? OFFLOAD_TUN_UDP : OFFLOAD_TUN_TCP));
    for (int i = 1; i < count; i++) {
        CHECK(size + pieces[i].iov_len <= sizeof whole);
        memcpy(whole + size, pieces[i].iov_base, pieces[i].iov_len);
        size += pieces[i].iov_len;
    }
    if (refusals & REFUSES_RUNS)
        return EINVAL;
    bool room = !(refusals & HAS_NO_ROOM);
    oracle_run_came_out(offload, whole, size, room ? came_out : vanished);
    return room ? 0 : EAGAIN;
}

int worker_write_packet(struct worker *writer, uint8_t *data, size_t size)
{
    CHECK(writer == &worker);
    struct expected *each = oracle_came_out(data, size);
    if (refusals & REFUSES_ALL) {
        vanished(each);
        return EIO;
    }
    came_out(each);
    return 0;
}

/* ---- The target. */

/* Two bytes: one of the length, and one of the third byte of 10.244.x.0 or the sixth of fd00:x::. */
static struct subnet read_subnet(bool v6)
{
    static const uint8_t lengths[2][8] = {{NO_SUBNET, 0, 8, 16, 24, 23, 30, 32}, {NO_SUBNET, 0, 16, 32, 64, 31, 127, 128}};
    struct subnet subnet = {.length = lengths[v6][input[0] % 8]};
    if (v6)
        memcpy(subnet.address, (uint8_t[]){0xFD, 0, 0, input[1]}, 4);
    else
        memcpy(subnet.address, (uint8_t[]){10, 244, input[1], 0}, 4);
    input += 2;
    left -= 2;
    return subnet;
}

static struct table *read_table(void)
{
    struct peer_counters *counters[PEERS];
    for (unsigned v6 = 0; v6 < 2; v6++)
        own[v6] = read_subnet(v6);
    for (unsigned i = 0; i < PEERS; i++) {
        /* One byte of the outer address: its version, and which of four. */
        unsigned outer = *input++;
        left--;
        peers[i] = (struct peer_entry){.version = outer & SENDER6 ? 6 : 4, .port = 8285, .counters = i};
        memcpy(peers[i].address, peers[i].version == 6 ? (uint8_t[]){0xFD, 0xFF, 0, 0} : (uint8_t[]){172, 16, 130, 0}, 4);
        peers[i].address[peers[i].version == 6 ? 15 : 3] = (outer & SENDER) >> 4;
        peers[i].subnet4 = read_subnet(false);
        peers[i].subnet6 = read_subnet(true);
        counters[i] = calloc(1, sizeof *counters[i]);
    }
    struct table *table = table_new(own, peers, PEERS, counters, PEERS, serves[0], serves[1]);
    CHECK(table != NULL);
    return table;
}

int LLVMFuzzerTestOneInput(const uint8_t *given, size_t size)
{
    enum { TABLE_BYTES = 2 + 4 + PEERS * 5 };
    static struct mmsghdr incoming[DATAGRAMS];
    static struct datagram rooms[DATAGRAMS];
    static struct coalescer coalescer;
    if (size < TABLE_BYTES)
        return 0;
    input = given;
    left = size;
    unsigned there = *input++;
    refusals = *input++;
    left -= 2;
    serves[0] = there & SERVES4;
    serves[1] = there & SERVES6;
    struct table *table = read_table();

    memset(&worker, 0, sizeof worker);
    memset(&coalescer, 0, sizeof coalescer);
    memset(wanted_drops, 0, sizeof wanted_drops);
    memset(wanted_packets, 0, sizeof wanted_packets);
    memset(wanted_bytes, 0, sizeof wanted_bytes);
    lost = expected_count = datagrams = 0;
    worker.batching = there & BATCHING;
    worker.now = SECOND;
    worker.incoming = incoming;
    worker.datagrams = rooms;
    worker.coalescer = &coalescer;
    for (unsigned i = 0; i < DATAGRAMS; i++)
        incoming[i].msg_hdr = (struct msghdr){
            .msg_name = &rooms[i].sender, .msg_iov = &rooms[i].piece, .msg_iovlen = 1, .msg_control = rooms[i].control};
    if (!(there & TCP))
        offload_set(&worker, OFFLOAD_TUN_TCP, OFFLOAD_OFF, 0);
    if (!(there & UDP))
        offload_set(&worker, OFFLOAD_TUN_UDP, OFFLOAD_OFF, 0);

    while (left >= 5 && datagrams < MOST)
        CHECK(worker_receive(&worker, table, WIRE) == 0);
    for (unsigned i = 0; i < expected_count; i++) {
        CHECK(expected[i].came_out && "nothing is lost");
        free((void *)expected[i].data);
    }
    wanted_drops[DROP_DEVICE_FAILED] = lost;
    for (unsigned i = 0; i < DROPS; i++)
        CHECK(atomic_load(&worker.drops[i]) == wanted_drops[i]);
    for (unsigned i = 0; i < PEERS; i++) {
        CHECK(atomic_load(&table->counters[i]->received_packets) == wanted_packets[i]);
        CHECK(atomic_load(&table->counters[i]->received_bytes) == wanted_bytes[i]);
    }
    for (unsigned i = 0; i < datagrams; i++)
        free(memory[i]);
    table_free(table);
    return 0;
}
