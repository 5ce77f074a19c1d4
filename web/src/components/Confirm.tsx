import { Button, Group, Stack } from '@mantine/core';
import { useMutation } from '@tanstack/react-query';
import type { ReactNode } from 'react';
import { useTranslation } from 'react-i18next';
import { ErrorNote } from './ErrorNote';

interface Props {
  children: ReactNode; // what comes of it, plainly
  yes: string;
  no?: string;
  act: () => Promise<unknown>;
  onDone: () => void; // done, or thought better of
}

/** The content of a dialog before something that can't be taken back. The focus is on the way out. */
export function Confirm({ children, yes, no, act, onDone }: Props) {
  const { t } = useTranslation();
  const acting = useMutation({ mutationFn: act, onSuccess: onDone });
  return (
    <Stack>
      {children}
      {acting.error ? <ErrorNote error={acting.error} /> : null}
      <Group justify="flex-end">
        <Button variant="default" onClick={onDone} data-autofocus>
          {no ?? t('app.cancel')}
        </Button>
        <Button color="red.8" loading={acting.isPending} onClick={() => acting.mutate()}>
          {yes}
        </Button>
      </Group>
    </Stack>
  );
}
