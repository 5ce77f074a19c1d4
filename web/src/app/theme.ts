import { createTheme, type CSSVariablesResolver, type MantineColorsTuple } from '@mantine/core';

const fern: MantineColorsTuple = [
  '#e8f6f3',
  '#d2ebe5',
  '#a4d6ca',
  '#74c1ae',
  '#4fc3ae',
  '#2fa58f',
  '#14806c',
  '#0b6e5f',
  '#08594d',
  '#05443b',
];

const slate: MantineColorsTuple = [
  '#e7ecf2',
  '#c8d1db',
  '#9fabba',
  '#76849a',
  '#3c4857',
  '#2b3542',
  '#1d2530',
  '#12171e',
  '#0e1319',
  '#0a0e13',
];

export const theme = createTheme({
  primaryColor: 'fern',
  primaryShade: { light: 7, dark: 6 },
  colors: { fern, dark: slate },
  defaultRadius: 'md',
  cursorType: 'pointer',
  fontFamily:
    'system-ui, -apple-system, "Segoe UI", "Apple SD Gothic Neo", "Noto Sans KR", "Noto Sans CJK KR", "Malgun Gothic", sans-serif',
  fontFamilyMonospace: 'ui-monospace, SFMono-Regular, Menlo, Consolas, "Noto Sans Mono", monospace',
  headings: {
    fontWeight: '650',
    sizes: { h1: { fontSize: '1.5rem' }, h2: { fontSize: '1.125rem' }, h3: { fontSize: '1rem' } },
  },
});

/** Mantine's dimmed greys are too pale to read on its own backgrounds (WCAG 1.4.3 wants 4.5:1). */
export const cssVariables: CSSVariablesResolver = () => ({
  variables: {},
  light: {
    '--mantine-color-body': '#fbfcfd',
    '--mantine-color-text': '#1c2430',
    '--mantine-color-dimmed': '#566171',
    '--mantine-color-placeholder': '#667180',
    '--mantine-color-error': '#c02b2b',
    '--mantine-color-fern-light': '#e3f3ef',
    '--mantine-color-fern-light-hover': '#d2ebe5',
    '--mantine-color-red-light': '#fdf1f1',
    '--mantine-color-red-light-color': '#a32020',
    '--fine-line': '#dfe5eb',
    '--fine-soft': '#f1f5f8',
    '--fine-card': '#ffffff',
    '--fine-accent': '#0b6e5f',
    '--fine-accent-soft': '#e3f3ef',
    '--fine-warm': '#a85a00',
  },
  dark: {
    '--mantine-color-dimmed': '#9fabba',
    '--mantine-color-placeholder': '#8b98a8',
    '--mantine-color-error': '#ff8a8a',
    '--mantine-color-red-light': '#2c1a1f',
    '--mantine-color-fern-light': '#15342f',
    '--mantine-color-fern-light-hover': '#1a4039',
    '--mantine-color-fern-light-color': '#7fdcc9',
    '--mantine-color-red-light-color': '#ff9d9d',
    '--fine-line': '#2b3542',
    '--fine-soft': '#1a212b',
    '--fine-card': '#171d26',
    '--fine-accent': '#4fc3ae',
    '--fine-accent-soft': '#15342f',
    '--fine-warm': '#f0b35c',
  },
});
