import { Stack, Text, Title } from '@mantine/core';
import type { ReactNode } from 'react';
import css from './Empty.module.css';

interface Props {
  title: string;
  text: string;
  picture?: ReactNode;
  children?: ReactNode;
  level?: 1 | 2;
}

/** A screen that has nothing to show yet says what would be here and how to get it. */
export function Empty({ title, text, picture, children, level = 2 }: Props) {
  return (
    <Stack className={css.empty ?? ''} align="center" gap="xs">
      {picture}
      <Title order={level} size="h2">
        {title}
      </Title>
      <Text c="dimmed" maw={460} ta="center">
        {text}
      </Text>
      {children ? <div className={css.actions}>{children}</div> : null}
    </Stack>
  );
}
