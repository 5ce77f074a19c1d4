/** The page's icons: 24 x 24 strokes, drawn by us. Always beside words or a label, so they say nothing themselves. */
const PATHS = {
  spark: 'M12 3v4m0 10v4M3 12h4m10 0h4M6 6l2.5 2.5m7 7L18 18M18 6l-2.5 2.5m-7 7L6 18',
  layers: 'M12 4 4 8l8 4 8-4-8-4ZM4 12l8 4 8-4M4 16l8 4 8-4',
  chip: 'M7 7h10v10H7zM10 3v4m4-4v4m-4 10v4m4-4v4M3 10h4m-4 4h4m10-4h4m-4 4h4',
  key: 'M14.5 9.5a4 4 0 1 1-1.2-2.8 4 4 0 0 1 1.2 2.8Zm-1.2 2.8L20 19m-2.5-2.5L19.5 14.5',
  person: 'M12 12a4 4 0 1 0 0-8 4 4 0 0 0 0 8ZM5 20c.8-3.5 3.5-5 7-5s6.2 1.5 7 5',
  people:
    'M9 11.5a3.5 3.5 0 1 0 0-7 3.5 3.5 0 0 0 0 7ZM3 19.5c.6-3.2 2.8-4.6 6-4.6s5.4 1.4 6 4.6M15.5 11.3a3 3 0 1 0-.6-5.9M17 15.2c2.3.4 3.6 1.8 4 4.3',
  bell: 'M6 16.5h12c-1.2-1.4-1.5-2.6-1.5-5.5a4.5 4.5 0 0 0-9 0c0 2.9-.3 4.1-1.5 5.5ZM10.3 19.5h3.4',
  more: 'M6 12h.01M12 12h.01M18 12h.01',
  link: 'M10 14a4 4 0 0 0 6 .4l2.6-2.6a4 4 0 0 0-5.7-5.7L11.8 7.2M14 10a4 4 0 0 0-6-.4l-2.6 2.6a4 4 0 0 0 5.7 5.7l1.1-1.1',
  download: 'M12 5v11m-4.5-4.5L12 16l4.5-4.5M5 19h14',
  edit: 'm5 19 1-4L16 5l3 3L9 18l-4 1Z',
  check: 'm5 12.5 4.5 4.5L19 7.5',
  leave: 'M10 5H6v14h4m3-10 4 3-4 3m4-3H9.5',
  send: 'M12 19V6m-6 5.5L12 5.5l6 6',
  stop: 'M8 8h8v8H8z',
  retry: 'M19 12a7 7 0 1 1-2-5m2-3v4h-4',
  copy: 'M9 9h10v10H9zM15 9V5H5v10h4',
  dials: 'M6 4v6m0 4v6M12 4v2m0 4v10M18 4v9m0 4v3M4 12h4M10 8h4m2 7h4',
  plus: 'M12 5v14M5 12h14',
  chevron: 'm8 10 4 4 4-4',
  upload: 'M12 16V5m-4.5 4.5L12 5l4.5 4.5M5 19h14',
  file: 'M7 4h7l4 4v12H7zM14 4v4h4',
  trash: 'M5 7h14M10 7V5h4v2m-7 0 1 13h8l1-13M10.5 11v5m3-5v5',
  warning: 'M12 4 3 19h18L12 4Zm0 6v4m0 2.6v.1',
  chat: 'M5 5h14v11h-8l-4 3.5V16H5z',
  eye: 'M3 12c2.2-4 5.3-6 9-6s6.8 2 9 6c-2.2 4-5.3 6-9 6s-6.8-2-9-6Zm9 2.5a2.5 2.5 0 1 0 0-5 2.5 2.5 0 0 0 0 5Z',
  left: 'm14 7-5 5 5 5',
} as const;

export type IconName = keyof typeof PATHS;

export function Icon({ name, size = 20 }: { name: IconName; size?: number }) {
  return (
    <svg
      viewBox="0 0 24 24"
      width={size}
      height={size}
      fill={name === 'stop' ? 'currentColor' : 'none'}
      stroke="currentColor"
      strokeWidth={1.7}
      strokeLinecap="round"
      strokeLinejoin="round"
      aria-hidden="true"
      focusable="false"
    >
      <path d={PATHS[name]} />
    </svg>
  );
}
