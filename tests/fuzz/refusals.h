/* What refusals.c can make fail. refusals.py has the same order. */
#ifndef REFUSALS_H
#define REFUSALS_H

enum refusable {
    REFUSE_DEVICE_UDP,      /* TUNSETOFFLOAD with USO */
    REFUSE_DEVICE_OFFLOADS, /* TUNSETOFFLOAD with anything */
    REFUSE_DEVICE_HEADER,   /* TUNSETIFF with IFF_VNET_HDR */
    REFUSE_SOCKET_SEGMENT,  /* setsockopt UDP_SEGMENT */
    REFUSE_SOCKET_GRO,      /* setsockopt UDP_GRO */
    REFUSE_SEND_SEGMENTED,  /* a message that is to be cut into datagrams */
    REFUSE_SEND,            /* any message to an internet address */
    REFUSE_RECEIVE,         /* recvmsg and recvmmsg of an internet socket */
    REFUSE_WRITE_RUN,       /* a run of packets, behind the device's header */
    REFUSE_WRITE,           /* anything behind the device's header */
    REFUSE_READ,            /* a packet out of a device, behind its header */
    REFUSE_THREAD,          /* pthread_create */
    REFUSE_DEVICE_GRO,      /* TUNSETIFF with IFF_NAPI */
    REFUSE_GRO_TIMEOUT,     /* opening a device's gro_flush_timeout */
    REFUSALS
};

struct refusal {
    int error;   /* what it fails with; 0: it does not */
    int times;   /* how often from now on; 0: for ever */
    int skip;    /* how many calls pass before */
    int refused; /* how many have failed */
};
extern struct refusal *refusals;

#endif
